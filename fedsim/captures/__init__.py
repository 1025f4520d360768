"""What can be kept of local steps: observer, size, reader and proof of each in one file."""
