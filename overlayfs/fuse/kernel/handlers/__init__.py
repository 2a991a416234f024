"""The handlers of the kernel engine, by subject. Each class lists in `handlers` which kinds of request it answers."""
