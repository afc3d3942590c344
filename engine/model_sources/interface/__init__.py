"""What every model source offers: the protocol, a base for views of one, and shared checks."""
