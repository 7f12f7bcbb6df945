"""The deployment of a shard, apart from the others so that its process does not load torch, which only they need."""

import faiss
import ray

from pipelines.serving.lines import Listener
from pipelines.serving.shards import Shards

LONGEST = 85  # characters of a folder in which a socket's folder is made: a socket's path may have 107


class ShardDeployment(Shards):
    """The deployment of a shard."""

    def __init__(self) -> None:
        super().__init__()
        here = ray.get_runtime_context()
        session = f"{here.get_temp_dir()}/{here.get_session_name()}"
        self.listener = Listener(self, session if len(session) < LONGEST else None)
        faiss.omp_set_num_threads(1)  # shards are searched side by side; a second thread costs more than it gains

    async def line(self) -> tuple[str, str]:
        """The machine that this is on, and the path of the socket on which it answers there."""
        return ray.get_runtime_context().get_node_id(), await self.listener.listen()
