"""Random operations on our mount and on the kernel's."""
