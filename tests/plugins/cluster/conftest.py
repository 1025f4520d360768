from tests.flower.conftest import run_locally

__all__ = ["run_locally"]
