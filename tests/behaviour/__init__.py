"""What the mount must do, on every driver."""
