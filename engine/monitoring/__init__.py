"""Training runs in a browser: what their directories say, as JSON"""
