"""What rows are read from: positions, unpacked files, and rows in JSON."""
