"""The peers of our service: what it is compared with, as small as each can be."""
