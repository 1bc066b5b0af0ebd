"""Who may use the server: keys, whose tenant they stand for, what they may do and how much of it."""
