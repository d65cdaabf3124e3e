"""Webhooks (Standard Webhooks 1.0): which URLs may be called, and how one message is delivered."""
