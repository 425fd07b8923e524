"""What orders the accesses of a kernel: barriers, their phases, asynchronous agents."""
