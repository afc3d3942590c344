"""The hub: names, cached files, downloads and uploads."""
