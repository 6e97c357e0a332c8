"""The law of deployment: what nodes and a server compute apart is what the simulator computes."""

import jax
import numpy as np
import pytest

from tests.deployment.federation import (
    MF,
    RING,
    SILOS,
    open_federation,
    read_states,
    run_federation,
    simulate,
)

CASES = {
    "mf": {},
    "silos": SILOS,
    "ring": RING,
    "ring of silos": RING | SILOS,
}
INTEGERS = {"ring", "ring of silos"}


@pytest.mark.parametrize("name", CASES)
def test_deployed_is_simulated(name, tmp_path):
    table = MF | CASES[name]
    lines = []
    server, nodes, parts = open_federation(tmp_path, table, say=lines.append)
    rounds = 3 if name in INTEGERS else 1
    found = run_federation(server, nodes, rounds)
    want, figures = simulate(parts, rounds, table["seed"])
    assert not lines
    got = jax.device_get(server.state)
    kept = read_states(server, nodes, parts)
    pairs = [*zip(jax.tree.leaves((got.shared, kept)), jax.tree.leaves((want.shared, want.client_states)), strict=True)]
    print([float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in pairs])
    for a, b in pairs:
        if name in INTEGERS:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(), 1))
    for mine, theirs in zip(found, figures, strict=True):
        assert {"clients/reported", "rows/sent"} <= mine.keys()
        assert int(mine["clients/reported"]) == int(theirs["clients/reported"])
