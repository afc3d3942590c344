"""OpenAI's interface: requests that are read, and the objects that answer them."""
