"""Pages for a browser: their files, and who may ask for them"""
