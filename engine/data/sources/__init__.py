"""Where rows come from: files of many formats, databases, the hub, Python."""
