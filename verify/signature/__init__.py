"""What an output element is computed from, and in which order: the reduction signature of a kernel."""
