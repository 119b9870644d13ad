"""Which clusters a run fits on: the workers, and beside them a CPU for the data."""

import pytest

from rayscale.data.pairs import DataPlacement
from rayscale.errors import ResourceError
from rayscale.train.job import Node, Placement, check_fits


def placed(num: int, cpus: float, gpus: float = 0.0, least: int = 0, label: str = "") -> Placement:
    data = DataPlacement(node_labels={"role": label} if label else {})
    return Placement(num_workers=num, min_workers=least, cpus_per_worker=cpus, gpus_per_worker=gpus, data=data)


def nodes(*cpus: float, gpus: float = 0.0) -> list[Node]:
    return [Node(n, gpus, {}) for n in cpus]


DATA = Node(4, 0, {"role": "data"})


@pytest.mark.parametrize(
    ("cluster", "placement"),
    [
        (nodes(2), placed(1, 1)),
        (nodes(3, 3), placed(2, 2)),
        (nodes(3, 3), placed(2, 2, least=1)),
        (nodes(2, 4), placed(2, 1.5)),
        (nodes(8, gpus=1), placed(1, 4, 1.0, least=1)),
        ([*nodes(4, gpus=1), DATA], placed(1, 4, 1.0, label="data")),
        ([*nodes(4, 4, gpus=1), DATA], placed(4, 4, 1.0, least=1, label="data")),  # two nodes are away
    ],
)
def test_these_fit(cluster: list[Node], placement: Placement) -> None:
    check_fits(cluster, placement)


@pytest.mark.parametrize(
    ("cluster", "placement", "said"),
    [
        (nodes(2), placed(2, 1), r"--workers=2: x 1 CPUs = 2, and Ray Data needs 1 more: the cluster has 2 on 1 node"),
        (nodes(2, 2), placed(2, 1.5), r"--workers=2: .* the cluster has 4 on 2 node"),
        (nodes(3, 3, 3), placed(4, 2), r"--workers=4"),
        (nodes(4), placed(1, 5), r"--cpus-per-worker=5: no node has so many: the largest has 4"),
        (nodes(4), placed(1, 1, 1.0), r"--gpus-per-worker=1.0: 1 GPUs are asked for, the cluster has 0"),
        (nodes(4, 4), placed(1, 1, label="data"), r"--data-nodes=role=data: no node has these labels"),
        (nodes(4, 4), placed(2, 2, least=1), r"--cpus-per-worker=2: workers that fill a node leave 0"),
        ([DATA, *nodes(4)], placed(2, 4, least=1, label="data"), r"--cpus-per-worker=4"),
        ([], placed(1, 1), r"--cpus-per-worker"),
    ],
)
def test_these_would_wait_for_ever(cluster: list[Node], placement: Placement, said: str) -> None:
    with pytest.raises(ResourceError, match=said):
        check_fits(cluster, placement)
