"""The Flask side: routes, requests and responses, API keys, limits, the OpenAPI document, metrics."""
