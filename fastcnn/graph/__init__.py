"""What works on a whole model: graphs of it, rewritten or frozen into a static plan."""
