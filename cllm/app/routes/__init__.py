"""What the app answers, a file for each part of it. A file has `routes(app) -> APIRouter`, and its line in `cllm.app.server`."""
