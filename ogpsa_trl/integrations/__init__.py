"""Plugins that bring the method into other frameworks' trainers; each needs its framework."""
