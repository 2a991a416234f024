"""What an overlay is: which entries make up a name, and what a change has to do.  Pure rules, no system calls."""
