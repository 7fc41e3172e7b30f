"""The Generate stage: samples pairs of noise and teacher sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distill.cache.pairs import HEADER, MANIFEST, Header, Pairs, differing, fields_of_pairs, read_manifest
from distill.cache.writer import WRITTEN, write_pairs
from distill.data.rng import noise_checksum
from distill.files import copy, sha256_file
from distill.models.autoencoder import WEIGHTS as DECODER_WEIGHTS
from distill.models.autoencoder import entry_of
from distill.models.denoiser import SOLVERS
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.models.precision import check_precision, in_precision
from distill.models.prompts import FILES as PROMPT_FILES
from distill.models.time_grid import TimeGrid
from distill.models.weights import weights_digest, weights_path
from distill.process.times import MAX_STEPS, default_grid
from distill.stages.base import ModelStage, Stage, StageContext, check_types
from distill.stages.made import Made, PairsMade
from distill.stages.ownership import needed, patterns
from distill.stages.threads import use_threads
from distill.typed import check_keys, parse

OWN = "teacher"  # the option `sampler` for the teacher's own sampler


@dataclass
class Generate(Stage):
    """Pairs of noise and teacher sample.

    Attributes:
        teacher: name of the stage whose model is sampled.
        count: number of pairs.
        guidance_scale: g in u + g (c - u), with conditional prediction c and unconditional u; [low, high]: drawn uniformly, for
            methods that take it as an input.
        states: store the states at all steps too, for methods that read `path`.
        sampler: {solver, steps, grid} of the ODE; grid: {name: ..., option: ...}, a key of `models.time_grid.NAMED` and
            options of its function; the default is the process's grid. "teacher": the teacher's own sampler.
        stream: name of the noise. Stages with the same stream and seed use the same noise.
        batch_size: samples per network call.
        path: an existing pair cache to copy; it must have been made by this teacher with these options.
        precision: of the teacher's network, see `models.precision.in_precision`; states of the solver are float32.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("teacher",)
    FILES: ClassVar[tuple[str, ...]] = (
        r"pairs-\d{5,}\.(?:safetensors|json)",
        *patterns(MANIFEST, HEADER, WRITTEN, DECODER_WEIGHTS, *PROMPT_FILES),
    )
    NEEDED: ClassVar[tuple[str, ...]] = (MANIFEST,)

    teacher: str
    count: int
    sampler: dict[str, Any] | str = field(default_factory=lambda: {"solver": "euler", "steps": 25})
    guidance_scale: float | list[Any] = 1.0
    states: bool = False
    stream: str = "pairs"
    batch_size: int = 256
    path: str | None = None
    precision: str = "float32"
    _found: str | None = field(default=None, init=False, repr=False)  # digest of the cache at `path`

    def __post_init__(self) -> None:
        check_types(self)
        check_precision(self.precision)
        self._guidance()
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"count, batch_size: expected at least 1, found {self.count}, {self.batch_size}")
        if isinstance(self.sampler, str):
            if self.sampler != OWN:
                raise ValueError(
                    f"sampler: found {self.sampler!r}, expected {OWN!r} or {{solver, steps, grid}}"
                )
            return
        check_keys(self.sampler, ("solver", "steps", "grid"), "sampler")
        solver, steps = self.sampler.get("solver"), self.sampler.get("steps")
        if solver not in SOLVERS:
            raise ValueError(f"sampler.solver: found {solver!r}, expected one of {list(SOLVERS)}")
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"sampler.steps: found {steps!r}, expected an integer of 1 .. {MAX_STEPS}")
        self._grid(self.sampler)

    def _guidance(self) -> tuple[float, tuple[float, float] | None]:
        """Return (scale of all pairs, range of scales or None)."""
        if not isinstance(self.guidance_scale, list):
            return float(self.guidance_scale), None
        found = parse(tuple[float, ...], self.guidance_scale, "guidance_scale")
        if len(found) != 2 or not 0 <= found[0] < found[1]:
            raise ValueError(
                f"guidance_scale: found {list(found)}, expected a number, or [low, high] with low < high"
            )
        return 1.0, (found[0], found[1])

    @staticmethod
    def _grid(sampler: Mapping[str, Any]) -> TimeGrid | None:
        """Return the time grid of `sampler`, or None for the default."""
        named = sampler.get("grid")
        return None if named is None else TimeGrid.from_dict(named, "sampler.grid")

    def _ode(self, teacher: Generator) -> tuple[str, int, TimeGrid | None]:
        """Return (solver, steps, grid) of the option `sampler`, or of the teacher's own sampler."""
        if not isinstance(self.sampler, str):
            return self.sampler["solver"], self.sampler["steps"], self._grid(self.sampler)
        spec = teacher.spec
        if spec.mode != "ode" or spec.steps in spec.times:
            raise ValueError(
                f"sampler: found {OWN!r}, but {self.teacher!r} is sampled at times of its own; expected {{solver, steps}}"
            )
        return spec.solver, spec.steps, spec.time_grid

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Raise ValueError unless the teacher is a stage that makes a model."""
        super().check(stages)
        if not isinstance(stages[self.teacher], ModelStage):
            raise ValueError(f"teacher: {self.teacher!r} makes no model; expected a stage with a model")

    def fingerprint(self) -> str:
        """Return the sha256 of the manifest of the cache at `path`."""
        if self.path is None:
            return ""
        self._found = sha256_file(needed(Path(self.path) / MANIFEST, "a finished pair cache"))
        return self._found

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Check that the teacher is an ODE that accepts guidance and grid, and that the cache at `path` matches."""
        teacher = before[self.teacher].model
        assert teacher is not None
        model = teacher.denoiser
        self._check_teacher(teacher)
        if self.path is not None:
            manifest = Path(self.path) / MANIFEST
            found, _ = read_manifest(needed(manifest, "a finished pair cache"))
            # The weights are compared in `run`, when the teacher exists; of a sketch also its decoder and prompts.
            sketched = any(p.is_meta for p in model.parameters())
            later = ("decoder", "conditions") if sketched else ()
            self._check_header(found, self._header(teacher, found.seed, found.teacher), later)
        scale, drawn = self._guidance()
        guidance, has = teacher.spec.guidance_baked * scale, fields_of_pairs(model.column, self.states, drawn)
        baked = self._header(teacher, 0, "").baked
        made = PairsMade(model.sample_shape, model.conditions, model.decoder, guidance, has, baked, drawn)
        return Made(pairs=made)

    def begun(self, folder: Path) -> bool:
        """Return whether a header or a shard exists."""
        return (folder / HEADER).is_file() or any(folder.glob("pairs-*.safetensors"))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the cache, starting at the first missing shard, and check it by reading it once."""
        teacher = load_model(context.inputs["teacher"])
        denoiser = in_precision(teacher.denoiser, self.precision)
        self._check_teacher(teacher)
        use_threads(context, sum(p.numel() for p in denoiser.parameters()))
        header = self._header(teacher, context.seed, weights_digest(weights_path(context.inputs["teacher"])))
        if self.path is not None:
            self._adopt(context, header)
        else:
            with context.display.bar(self.count, unit="pair") as bar:
                write_pairs(
                    context.folder,
                    denoiser,
                    header,
                    batch_size=self.batch_size,
                    device=context.device,
                    world=context.world,
                    on_samples=bar.update,
                    tell=context.display.line,
                )
        Pairs(context.folder)
        scale, drawn = self._guidance()
        nfe = denoiser.calls(header.solver, header.steps, scale if drawn is None else drawn[1])
        return {"count": self.count, "nfe_per_pair": nfe}

    def _check_teacher(self, teacher: Generator) -> None:
        """Raise ValueError unless the model is an ODE from noise to data that accepts the guidance scale."""
        scale, drawn = self._guidance()
        try:
            teacher.denoiser.check_transport(scale if drawn is None else drawn[1], self._ode(teacher)[0])
        except ValueError as error:
            raise ValueError(f"teacher: {self.teacher!r}: {error}") from error
        if teacher.denoiser.column == "tokens" and (self.states or drawn is not None):
            option = "states: found true" if self.states else f"guidance_scale: found {list(drawn or ())}"
            raise ValueError(
                f"{option}, but the teacher is a model of tokens; expected one of states in continuous time"
            )
        if drawn is not None and teacher.spec.guidance_baked != 1:
            raise ValueError(
                f"guidance_scale: found {list(drawn)}, but the teacher has learned guidance {teacher.spec.guidance_baked:g}; "
                "expected one number"
            )
        _, steps, grid = self._ode(teacher)
        if grid is not None:
            grid.make(teacher.denoiser.process, steps)

    def _header(self, generator: Generator, seed: int, teacher_sha256: str) -> Header:
        """Return the header that the cache must have."""
        teacher = generator.denoiser
        solver, steps, grid = self._ode(generator)
        scale, drawn = self._guidance()
        times = None
        if self.states:
            made = default_grid(teacher.process, steps) if grid is None else grid.make(teacher.process, steps)
            times = tuple(made.tolist())
        return Header(
            sample_shape=teacher.sample_shape,
            count=self.count,
            seed=seed,
            stream=self.stream,
            noise_checksum=noise_checksum(seed, self.stream, teacher.sample_shape),
            teacher=teacher_sha256,
            solver=solver,
            steps=steps,
            guidance_scale=scale,
            guidance_range=drawn,
            times=times,
            conditions=teacher.conditions.config(),
            decoder=entry_of(teacher.decoder),
            guidance_learned=generator.spec.guidance_baked,
            grid=None if grid is None else grid.to_dict(),
            column=teacher.column,
            settings=teacher.transport_settings(),
            precision=self.precision,
        )

    def _check_header(self, header: Header, wanted: Header, later: tuple[str, ...] = ()) -> None:
        """Raise ValueError unless the cache at `path` equals the one that this stage would make; `later`: entries that are
        not compared."""
        free = (
            "seed",
            "stream",
            "noise_checksum",
            "torch",
            "noise",
            *later,
        )  # checked by the reader as far as necessary
        changed = differing(header, wanted, free)
        if changed:
            what = ", ".join(
                f"{key}: found {getattr(header, key)!r}, expected {getattr(wanted, key)!r}" for key in changed
            )
            raise ValueError(
                f"path: {Path(str(self.path)) / MANIFEST}: does not match the options of this stage: {what}"
            )

    def _adopt(self, context: StageContext, wanted: Header) -> None:
        """Copy the cache at `path`. Raises ValueError unless it was made by this teacher with these options."""
        assert self.path is not None
        source = Path(self.path)
        pairs = Pairs(source)
        self._check_header(pairs.header, wanted)
        if context.world.main:
            for shard in pairs.shards:
                copy(source / shard.file, context.folder / shard.file)
            if (source / DECODER_WEIGHTS).is_file():
                copy(source / DECODER_WEIGHTS, context.folder / DECODER_WEIGHTS)
            pairs.conditions.copy_to(context.folder)
            copy(source / MANIFEST, context.folder / MANIFEST)
            if self._found not in (None, sha256_file(context.folder / MANIFEST)):
                raise ValueError(f"{source / MANIFEST}: changed during the run; start the run again")
        context.world.barrier()
