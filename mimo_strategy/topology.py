"""The process groups of a layout: one grid and one process-group collection per module, made and destroyed here."""

import os
import weakref
from collections.abc import Iterable, Mapping
from datetime import timedelta
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.process_groups_config import MultiModuleProcessGroupCollection, ProcessGroupCollection

from mimo_strategy.layout import LANGUAGE, Layout, ModuleLayout, ModuleSizes

assert LANGUAGE == MIMO_LANGUAGE_MODULE_KEY

# The optimizer of megatron-core looks the expert groups up under this name.
EXPERT_VIEW = "expert"

# Fields of megatron-core's ProcessGroupCollection, and the dims of the grid that each spans.
_PRIMARY_FIELDS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "dp_cp": ("cp", "dp"),
    "intra_dp_cp": ("cp", "dp"),
    "dp_cp_gtp_remat": ("cp", "dp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "mp": ("tp", "pp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}
_EXPERT_FIELDS = {
    "ep": ("ep",),
    "expt_tp": ("expt_tp",),
    "expt_dp": ("expt_dp",),
    "intra_expt_dp": ("expt_dp",),
    "expt_dp_gtp_remat": ("expt_dp",),
    "tp_ep": ("expt_tp", "ep"),
    "tp_ep_pp": ("expt_tp", "ep", "pp"),
    "tp_ep_pp_with_egtp_remat": ("expt_tp", "ep", "pp"),
}


class ProcessGroups:
    """The process groups of this process: one for each distinct set of ranks, whoever asks for it.

    Creation is collective: every rank must ask for the same sets in the same order.

    Args:
        timeout: of their collectives; ``None`` is torch's own.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self._by_ranks = {tuple(range(dist.get_world_size())): dist.group.WORLD}

    def containing_me(self, rank_sets: Iterable[Iterable[int]]) -> dist.ProcessGroup | None:
        """Make the groups of all ``rank_sets`` and return the one that holds this rank, if any."""
        mine = None
        for ranks in rank_sets:
            key = tuple(sorted(ranks))
            if key not in self._by_ranks:
                self._by_ranks[key] = dist.new_group(list(key), timeout=self._timeout)
            if dist.get_rank() in key:
                mine = self._by_ranks[key]
        return mine

    def destroy(self) -> None:
        """Destroy every group made here that this rank belongs to and that has not gone with its world."""
        for group in self._by_ranks.values():
            if group is not dist.group.WORLD and group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)
        self._by_ranks.clear()


class Grid(HyperCommGrid):
    """``HyperCommGrid`` of one module, whose groups come from ``process_groups``, which all grids share."""

    def __init__(self, layout: ModuleLayout, process_groups: ProcessGroups) -> None:
        self.process_groups = process_groups
        with _world_size_in_environment():
            super().__init__(
                [layout.tp, layout.cp, layout.dp, layout.pp],
                ["tp", "cp", "dp", "pp"],
                rank_offset=layout.rank_offset,
            )

    def create_pg(self, dims, *, view=None, **options):
        # Upstream makes a communicator for every name of the same ranks, about twenty per module.
        spec = self._resolve_view(view)
        ordered, _ = self._order_dims_for_view(spec, dims)
        key, _, _ = self._canonical_pg_key_and_enum_view(spec, ordered)
        self._pgs[key] = self.process_groups.containing_me(self.get_rank_enum(dims, view=view))
        return self._pgs[key]


def _world_size_in_environment():
    """``HyperCommGrid`` takes WORLD_SIZE from the environment, where a job's launcher may have left another number."""
    return mock.patch.dict(os.environ, WORLD_SIZE=str(dist.get_world_size()))


def build_grid(layout: ModuleLayout, process_groups: ProcessGroups, *, expert_view: bool = True) -> Grid:
    """The grid of one module with all its groups; collective over the world.

    The dims are ordered tp, cp, dp, pp: pp must be the outermost for the expert view (expt_tp, ep, expt_dp, pp)
    to share it.
    """
    grid = Grid(layout, process_groups)
    for dims in dict.fromkeys(_PRIMARY_FIELDS.values()):
        grid.create_pg(list(dims))
    if expert_view:
        grid.register_view(
            EXPERT_VIEW,
            [layout.etp, layout.ep, layout.edp, layout.pp],
            ["expt_tp", "ep", "expt_dp", "pp"],
            shared_dims=["pp"],
        )
        for dims in dict.fromkeys(_EXPERT_FIELDS.values()):
            grid.create_pg(list(dims), view=EXPERT_VIEW)
    return grid


def collect_groups(grid: HyperCommGrid) -> ProcessGroupCollection:
    """The process-group collection of a grid whose groups exist; expert fields are ``None`` without expert view."""
    groups = ProcessGroupCollection()
    for field, dims in _PRIMARY_FIELDS.items():
        setattr(groups, field, grid.get_pg(list(dims)))
    has_experts = EXPERT_VIEW in grid._views
    for field, dims in _EXPERT_FIELDS.items():
        setattr(groups, field, grid.get_pg(list(dims), view=EXPERT_VIEW) if has_experts else None)
    groups.embd = groups.pos_embd = None
    return groups


class Topology:
    """Grids and process-group collections of a layout, seen from this rank.

    Creating one is collective over the world and needs an initialised ``torch.distributed``. No global parallel
    state of megatron-core is touched but its memory buffer.

    Args:
        layout: the resolved layout.
        timeout: of collectives in the groups of modules and bridges; ``None`` is torch's own.

    Attributes:
        layout: the resolved layout.
        rank: this process's global rank.
        grids: grid of every module, by name.
        groups: process-group collection of the modules that run on this rank, by name.
    """

    def __init__(self, layout: Layout, timeout: timedelta | None = None) -> None:
        if dist.get_world_size() != layout.world_size:
            raise ValueError(
                f"the layout is for {layout.world_size} ranks, torch.distributed has {dist.get_world_size()}"
            )
        self.layout = layout
        self.rank = dist.get_rank()
        self._process_groups = ProcessGroups(timeout)
        self.grids: dict[str, Grid] = {}
        self.groups: dict[str, ProcessGroupCollection] = {}
        for name, module in layout.modules.items():
            self.grids[name] = build_grid(module, self._process_groups)
            embedding_groups = self._build_embedding_groups(self.grids[name]) if name == LANGUAGE else {}
            if self.runs(name):
                self.groups[name] = collect_groups(self.grids[name])
                vars(self.groups[name]).update(embedding_groups)
        _alive.add(self)
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()
        if dist.get_backend() == "gloo":
            # it connects ranks pair by pair: a group destroyed early breaks those that still connect
            dist.barrier()

    @classmethod
    def single_process(cls, sizes: Mapping[str, ModuleSizes]) -> "Topology":
        """All modules on this one process; initialises ``torch.distributed`` alone where nobody has.

        Raises:
            RuntimeError: if ``torch.distributed`` runs with more than one rank.
        """
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if dist.get_world_size() > 1:
            raise RuntimeError(
                "a model of several modules trains on many ranks under MimoHeteroStrategy only; "
                f"this strategy started {dist.get_world_size()}"
            )
        return cls(Layout.resolve(sizes, world_size=1))

    def runs(self, module: str) -> bool:
        """Whether ``module`` runs on this rank."""
        return self.rank in self.layout.modules[module].ranks

    @property
    def schedule_groups(self) -> MultiModuleProcessGroupCollection:
        """The collections of this rank's modules in the form that megatron-core's 1F1B schedule takes."""
        return MultiModuleProcessGroupCollection(self.groups, LANGUAGE if self.runs(LANGUAGE) else None)

    def _build_embedding_groups(self, grid: Grid) -> dict[str, dist.ProcessGroup | None]:
        """First and last stages share word embeddings, first stages hold position embeddings."""
        pipelines = grid.get_rank_enum("pp")
        return {
            "embd": self._process_groups.containing_me(
                parallel_state.default_embedding_ranks(ranks) for ranks in pipelines
            ),
            "pos_embd": self._process_groups.containing_me(
                parallel_state.default_position_embedding_ranks(ranks) for ranks in pipelines
            ),
        }

    def destroy(self) -> None:
        """Destroy every process group made here, and the memory buffer with the last topology."""
        self._process_groups.destroy()
        self.grids.clear()
        self.groups.clear()
        _alive.discard(self)
        if not _alive:
            parallel_state._GLOBAL_MEMORY_BUFFER = None


_alive: "weakref.WeakSet[Topology]" = weakref.WeakSet()
