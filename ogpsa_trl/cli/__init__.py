"""The commands: keys of YAML files and command lines, and what each command does with them."""
