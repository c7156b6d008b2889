"""A bundle over HTTP, with OpenAI's API: docs/serve.md. Needs the extra `serve`."""
