"""What every model source offers: protocol, view and shared checks."""
