"""Every changing system call of every operation is a place where the machine may stop or the disk may fail."""
