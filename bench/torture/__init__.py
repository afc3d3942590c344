"""Campaigns of kills, rot, full disks and hostile files, larger than a test may be."""
