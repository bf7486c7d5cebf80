"""Methods side by side at equal safety: test beds, methods, tables; and what they cost."""
