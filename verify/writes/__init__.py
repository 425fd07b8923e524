"""Which bytes of private and shared memory have been written when they are read."""
