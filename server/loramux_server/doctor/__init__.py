"""What `loramux doctor` looks at. Each module answers for one part; nothing is changed or downloaded."""
