"""An HTTP server that speaks OpenAI's interface: requests, answers, limits and safety."""
