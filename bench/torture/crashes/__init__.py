"""Campaigns that kill a program at any moment, or refuse it resources."""
