"""`pipenv run start`: Valkey if no Redis is configured, the web server and the workers, in one terminal."""
