"""Campaigns of kills, rot, full disks and hostile files."""
