"""gunicorn's settings for the tutorial's app: one process of eight threads."""

import os

bind = f"127.0.0.1:{os.environ['PORT']}"
threads = 8
# Our own settings disable it, too: the socket is one file per user.
control_socket_disable = True
