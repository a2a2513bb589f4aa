"""M3-digits: a small Symile-M3 made of real data in half a minute, without any download.

Symile-M3 asks: which image goes with this clip and this text? The clip tells only the language, the text names one
class per language, and only together do they name the image. Here the 100 classes are the numbers 00 to 99:

    image   two scans of handwritten digits (scikit-learn's copy of the UCI set), tens left, units right; 8 x 16 grey
    audio   espeak-ng speaking some number, unrelated to the class, in the sample's language; FLAC, 16 kHz, 16 bit
    text    one number name per language, digit by digit, shuffled, joined by "_": the name in the clip's language is
            the image's number, the others are other numbers
    json    {"class": "47", "language": "el", "spoken": "12", ...}

The numbers of one text are all different, so that nothing but the clip tells which of the W names is meant: a method
that sees only pairs of modalities stays at 1/W.

No handwritten scan and no voice of one split occurs in another.
"""

from __future__ import annotations

import ctypes
import io
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from symile_dist.seeding import permutation, philox

GENERATOR_VERSION = 1
"""Raised whenever the same parameters would give other bytes."""

LANGUAGES = ("en", "el", "hi", "ja", "uk", "ar", "ko", "te", "th", "zh")
"""W languages are the first W of these: 2, 5 and 10 give the sets of Symile-M3."""

SPLITS = ("train", "val", "test")
SAMPLE_RATE = 16000
"""Hz: of the FLAC files."""

DIGIT_WORDS: dict[str, tuple[str, ...]] = {
    "ar": ("صفر", "واحد", "اثنان", "ثلاثة", "أربعة", "خمسة", "ستة", "سبعة", "ثمانية", "تسعة"),
    "el": ("μηδέν", "ένα", "δύο", "τρία", "τέσσερα", "πέντε", "έξι", "επτά", "οκτώ", "εννέα"),
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "hi": ("शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ"),
    "ja": ("ゼロ", "いち", "に", "さん", "よん", "ご", "ろく", "なな", "はち", "きゅう"),
    "ko": ("영", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구"),
    "te": ("సున్నా", "ఒకటి", "రెండు", "మూడు", "నాలుగు", "ఐదు", "ఆరు", "ఏడు", "ఎనిమిది", "తొమ్మిది"),
    "th": ("ศูนย์", "หนึ่ง", "สอง", "สาม", "สี่", "ห้า", "หก", "เจ็ด", "แปด", "เก้า"),
    "uk": ("нуль", "один", "два", "три", "чотири", "п’ять", "шість", "сім", "вісім", "дев’ять"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}

_ESPEAK_LANGUAGE = {"en": "en-us", "zh": "cmn"}
"""Where espeak-ng's name of a language is not ours."""

_VOICES: dict[str, tuple[str, ...]] = {
    "train": (
        "m1", "m2", "m4", "m5", "m7", "m8", "f1", "f3", "f4", "f5",
        "adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "antonio", "aunty", "belinda", "benjamin",
        "boris", "caleb", "david", "Denis", "Diogo", "ed", "edward", "Gene", "grandma", "gustave",
        "Henrique", "Hugo", "ian", "iven", "iven3", "Jacky", "john", "klatt", "klatt3", "Lee",
        "linda", "marcelo", "Marco", "max", "Michael", "michel", "Mike", "norbert", "pablo", "paul",
        "quincy", "Reed", "rob", "sandro", "shelby", "steph", "travis", "victor",
    ),
    "val": ("m6", "anika", "edward2", "Gene2", "klatt4", "Mario", "pedro", "steph2"),
    "test": ("m3", "f2", "announcer", "grandpa", "iven2", "klatt2", "Nguyen", "robert", "miguel", "steph3", "zac"),
}  # fmt: skip
"""espeak-ng's voice variants, without the robots and whispers: speakers, of whom each belongs to one split."""

_POOL_SIZE = {"train": 2000, "val": 300, "test": 300}
"""Clips per language, of which samples draw with replacement: what about 10 s of two cores can speak and encode."""

_SCAN_SHARE = {"val": 0.10, "test": 0.15}
"""Share of each digit's scans; the training split has the rest."""

_SPEEDS = (170, 250)
"""Words per minute, first and last."""
_PITCHES = (25, 75)
"""espeak-ng's scale of 0 to 99, first and last."""


class Clip(NamedTuple):
    """What espeak-ng is asked to say, and how."""

    voice: str
    """The voice variant, without the language."""
    speed: int
    """Words per minute."""
    pitch: int
    """0 to 99."""
    number: int
    """0 to 99: spoken digit by digit."""


class _Plan(NamedTuple):
    """Everything that determines the bytes of a dataset."""

    languages: tuple[str, ...]
    counts: dict[str, int]
    seed: int
    samples_per_shard: int

    def parameters(self) -> dict[str, Any]:
        return {
            "generator_version": GENERATOR_VERSION,
            "languages": list(self.languages),
            "samples": dict(self.counts),
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
        }

    def pool_size(self, split: str) -> int:
        """Clips per language: fewer where the split is too small to use them all."""
        return min(_POOL_SIZE[split], max(1, self.counts[split] // len(self.languages)))

    def shards(self, split: str) -> int:
        return -(-self.counts[split] // self.samples_per_shard)


def make_demo(
    out: str | Path,
    *,
    languages: int = 5,
    train: int = 20000,
    val: int = 2000,
    test: int = 2000,
    seed: int = 0,
    samples_per_shard: int = 1000,
    progress: Callable[[str, int, int], None] | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Writes the M3-digits dataset to `out`/{train,val,test}/shard-*.tar, each split with its index.

    The bytes depend on the parameters and the seed alone, not on `processes` (default: one per core). The dataset is
    built in a temporary folder beside `out` and renamed at the end: a killed run leaves no half dataset, only a folder
    named .<out>.building-*. `progress` is called with (stage, done, total) from the calling thread.

    Child processes are spawned: a script that calls this needs the usual `if __name__ == "__main__":`.

    Returns what demo.json holds (parameters, files and sizes) plus "path", "created" (False where the same dataset
    was already there and nothing was done), "seconds" and a one-line "message".

    Raises ValueError for parameters out of range, where `out` holds anything else, or where a package of the `demo`
    extra is missing; RuntimeError where a child process fails.
    """
    started = time.monotonic()
    if not 1 <= languages <= len(LANGUAGES):
        raise ValueError(f"languages must be 1 to {len(LANGUAGES)}, not {languages}")
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split} must be at least 1 sample, not {count}")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
    workers = processes if processes is not None else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"processes must be at least 1, not {workers}")

    plan = _Plan(LANGUAGES[:languages], counts, seed, samples_per_shard)
    out = Path(out).absolute()
    present = _existing(out, plan)
    if present is not None:
        message = f"{out} already holds this dataset; nothing done"
        return {**present, "path": str(out), "created": False, "seconds": 0.0, "message": message}
    _check_packages()

    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}.building-{os.getpid()}-{threading.get_ident()}")
    shutil.rmtree(building, ignore_errors=True)  # left by a killed process of the same id
    building.mkdir()
    try:
        summary = _build(building, plan, workers, progress)
        try:
            os.replace(building, out)
        except OSError as error:
            # Another process may have finished the same dataset meanwhile; `_existing` raises for anything else.
            present = _existing(out, plan)
            if present is None:
                raise RuntimeError(f"cannot rename {building} to {out}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    seconds = time.monotonic() - started
    message = f"{sum(counts.values())} samples in {len(plan.languages)} languages written to {out} in {seconds:.0f} s"
    return {**summary, "path": str(out), "created": True, "seconds": seconds, "message": message}


def number_name(number: int, language: str) -> str:
    """ "four seven" for (47, "en"): both digits, in the script of the language."""
    words = DIGIT_WORDS[language]
    return f"{words[number // 10]} {words[number % 10]}"


def scan_split(targets: NDArray[np.integer[Any]], seed: int) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Which scans belong to which split: {split: {digit: indices into `targets`}}, stratified by digit.

    `targets` is (S,): the digit that each scan shows.
    """
    shares: dict[str, dict[int, NDArray[np.int64]]] = {split: {} for split in SPLITS}
    for digit in range(10):
        scans = np.flatnonzero(targets == digit)
        scans = scans[permutation(len(scans), "demo", seed, "scans", digit)]
        n_val, n_test = (int(len(scans) * _SCAN_SHARE[split]) for split in ("val", "test"))
        shares["val"][digit] = scans[:n_val]
        shares["test"][digit] = scans[n_val : n_val + n_test]
        shares["train"][digit] = scans[n_val + n_test :]
    return shares


def clip_plan(seed: int, split: str, language: str, count: int) -> list[Clip]:
    """The clips of one language and split, a pure function of its arguments."""
    rng = np.random.Generator(philox("demo", seed, "clips", split, language))
    voices = _VOICES[split]
    return [
        Clip(
            voice=voices[int(rng.integers(len(voices)))],
            speed=int(rng.integers(_SPEEDS[0], _SPEEDS[1] + 1)),
            pitch=int(rng.integers(_PITCHES[0], _PITCHES[1] + 1)),
            number=int(rng.integers(100)),
        )
        for _ in range(count)
    ]


class Speech:
    """espeak-ng through ctypes, in synchronous retrieval mode: no audio device, no thread, no file.

    The library keeps state from clip to clip (its noise sources and oscillators run on, and neither a new seed nor
    `espeak_Terminate` resets them), so a clip's samples depend on everything this process has spoken before. Whoever
    wants reproducible clips speaks a fixed list of them in a fresh process.
    """

    _SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS
    _UTF8 = 1  # espeakCHARS_UTF8
    _RATE, _PITCH = 1, 3  # espeakRATE, espeakPITCH

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        path = str(espeakng_loader.get_data_path()).encode()
        self.sample_rate: int = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, path, 0)
        """Hz"""
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak_Initialize failed with {self.sample_rate} (data folder {path.decode()})")
        self._pieces: list[bytes] = []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback_type(self._collect)  # kept: ctypes does not hold callbacks alive
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, clip: Clip, language: str) -> NDArray[np.int16]:
        """(T,) int16 at `sample_rate`. Raises RuntimeError where the voice is unknown or nothing comes out."""
        voice = f"{_ESPEAK_LANGUAGE.get(language, language)}+{clip.voice}"
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice '{voice}'")
        self._library.espeak_SetParameter(self._RATE, clip.speed, 0)
        self._library.espeak_SetParameter(self._PITCH, clip.pitch, 0)
        # Digit characters: number words come out broken in several of the languages.
        text = f"{clip.number // 10} {clip.number % 10}".encode()
        self._pieces.clear()
        status = self._library.espeak_Synth(text, len(text) + 1, 0, 0, 0, self._UTF8, None, None)
        if status != 0 or not self._pieces:
            raise RuntimeError(f"espeak-ng said nothing for {clip} in '{language}' (status {status})")
        return np.frombuffer(b"".join(self._pieces), dtype=np.int16)


def _existing(out: Path, plan: _Plan) -> dict[str, Any] | None:
    """The demo.json of the same dataset at `out`, None where nothing is there; ValueError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    what = "is not a folder" if not out.is_dir() else "holds something that is not this dataset"
    try:
        present = json.loads((out / "demo.json").read_text(encoding="utf-8"))
        differing = {
            name: present["parameters"].get(name)
            for name, value in plan.parameters().items()
            if present["parameters"].get(name) != value
        }
        if not differing:
            missing = [
                f"{split}/{name}"
                for split, entry in present["splits"].items()
                for name, size in entry["shards"].items()
                if not (out / split / name).is_file() or (out / split / name).stat().st_size != size
            ]
            if not missing:
                return dict(present)
            what = f"holds a damaged copy of this dataset ({missing[0]} is missing or has the wrong size)"
        else:
            what = (
                "holds a demo dataset of other parameters ("
                + ", ".join(f"{name}: {value}" for name, value in differing.items())
                + ")"
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{out} {what}; name another folder or remove it first")


def _check_packages() -> None:
    """Raises ValueError where a package is missing that only the demo needs."""
    try:
        import espeakng_loader  # noqa: F401
        import scipy.signal  # noqa: F401
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the demo dataset needs {error.name}: pip install 'symile-dist[demo]'") from error


def _build(folder: Path, plan: _Plan, workers: int, progress: Callable[[str, int, int], None] | None) -> dict[str, Any]:
    """Writes the whole dataset below `folder`, demo.json last, and returns what that holds."""
    from sklearn.datasets import load_digits

    from symile_dist.data.manifest import index_directory

    report = progress or (lambda stage, done, total: None)
    scratch = folder / "scratch"
    scratch.mkdir()
    digits = load_digits()
    np.savez(scratch / "scans.npz", images=(digits.images * (255 / 16)).astype(np.uint8), targets=digits.target)

    pools = [(split, language) for split in SPLITS for language in plan.languages]
    report("speech", 0, len(pools))
    jobs = [(scratch, plan.seed, split, language, plan.pool_size(split)) for split, language in pools]
    for done, _ in enumerate(_in_fresh_processes(_speak_pool, jobs, workers), start=1):
        report("speech", done, len(pools))

    for split in SPLITS:
        (folder / split).mkdir()
    shards = [(split, number) for split in SPLITS for number in range(plan.shards(split))]
    report("shards", 0, len(shards))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=spawn) as executor:
        futures = [executor.submit(_write_shard, folder, scratch, plan, *shard) for shard in shards]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                report("shards", done, len(shards))
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise

    shutil.rmtree(scratch)
    for done, split in enumerate(SPLITS, start=1):
        index_directory(folder / split)
        report("index", done, len(SPLITS))
    summary: dict[str, Any] = {
        "dataset": "M3-digits",
        "parameters": plan.parameters(),
        "classes": 100,
        "splits": {
            split: {
                "samples": plan.counts[split],
                "clips_per_language": plan.pool_size(split),
                "shards": {path.name: path.stat().st_size for path in sorted((folder / split).glob("shard-*.tar"))},
            }
            for split in SPLITS
        },
    }
    (folder / "demo.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return summary


def _in_fresh_processes(
    target: Callable[..., None], jobs: list[tuple[Any, ...]], workers: int
) -> Iterator[tuple[Any, ...]]:
    """Runs target(*job) in a process of its own per job, `workers` at a time; yields jobs as they end.

    Not a pool: `Speech` needs a process that has spoken nothing yet. Raises RuntimeError where one fails.
    """
    spawn = multiprocessing.get_context("spawn")

    def run(job: tuple[Any, ...]) -> tuple[Any, ...]:
        process = spawn.Process(target=target, args=job, daemon=True)
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"speaking the clips of {job[2]}/{job[3]} failed (exit code {process.exitcode})")
        return job

    with ThreadPoolExecutor(workers) as executor:
        futures = [executor.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _speak_pool(scratch: Path, seed: int, split: str, language: str, count: int) -> None:
    """Speaks one pool of clips into scratch/<split>-<language>.npz: the FLAC files end to end, and where each ends."""
    import soundfile
    from scipy.signal import firwin, resample_poly

    speech = Speech()
    divisor = int(np.gcd(SAMPLE_RATE, speech.sample_rate))
    up, down = SAMPLE_RATE // divisor, speech.sample_rate // divisor
    # resample_poly's default filter, designed once.
    taps = firwin(2 * 10 * max(up, down) + 1, 1.0 / max(up, down), window=("kaiser", 5.0)).astype(np.float32)
    files: list[bytes] = []
    for clip in clip_plan(seed, split, language, count):
        samples = resample_poly(speech.speak(clip, language).astype(np.float32), up, down, window=taps)
        file = io.BytesIO()
        pcm = np.clip(np.rint(samples), -32768, 32767).astype(np.int16)
        soundfile.write(file, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        files.append(file.getvalue())
    ends = np.cumsum([len(file) for file in files])
    np.savez(_pool_path(scratch, split, language), files=np.frombuffer(b"".join(files), np.uint8), ends=ends)


def _pool_path(scratch: Path, split: str, language: str) -> Path:
    return scratch / f"{split}-{language}.npz"


def _write_shard(folder: Path, scratch: Path, plan: _Plan, split: str, number: int) -> None:
    """Writes folder/<split>/shard-<number>.tar: every sample is a pure function of (plan, split, its index)."""
    from webdataset.writer import ShardWriter

    with np.load(scratch / "scans.npz") as scans:
        images, targets = scans["images"], scans["targets"]
    scans_of = scan_split(targets, plan.seed)[split]
    clips = {name: clip_plan(plan.seed, split, name, plan.pool_size(split)) for name in plan.languages}
    pools: dict[str, tuple[bytes, list[int]]] = {}
    for name in plan.languages:
        with np.load(_pool_path(scratch, split, name)) as pool:
            pools[name] = pool["files"].tobytes(), [0, *pool["ends"].tolist()]

    # ShardWriter does not close what its opener opened.
    opened: list[io.BufferedWriter] = []

    def opener(name: str) -> io.BufferedWriter:
        opened.append((folder / split / name).open("wb"))
        return opened[-1]

    first = number * plan.samples_per_shard
    last = min(first + plan.samples_per_shard, plan.counts[split])
    try:
        # Without fixed times and owners two runs would differ.
        with ShardWriter(
            "shard-%05d.tar", maxcount=plan.samples_per_shard, start_shard=number, verbose=0, opener=opener,
            encoder=False, mtime=0, user="", group="", mode=0o644,
        ) as writer:  # fmt: skip
            for index in range(first, last):
                writer.write(_sample(plan, split, index, images, scans_of, clips, pools))
    finally:
        for stream in opened:
            stream.close()


def _sample(
    plan: _Plan,
    split: str,
    index: int,
    images: NDArray[np.uint8],
    scans_of: dict[int, NDArray[np.int64]],
    clips: dict[str, list[Clip]],
    pools: dict[str, tuple[bytes, list[int]]],
) -> dict[str, str | bytes]:
    """One sample as ShardWriter takes it: a key and the bytes of each member."""
    from PIL import Image

    rng = np.random.Generator(philox("demo", plan.seed, "sample", split, index))
    language = plan.languages[int(rng.integers(len(plan.languages)))]
    target = int(rng.integers(100))
    scans = [int(scans_of[digit][rng.integers(len(scans_of[digit]))]) for digit in divmod(target, 10)]
    png = io.BytesIO()
    Image.fromarray(np.concatenate([images[scan] for scan in scans], axis=1)).save(png, format="PNG")

    number = int(rng.integers(len(clips[language])))
    clip = clips[language][number]
    files, ends = pools[language]

    # All numbers of a text differ: a repeated one could not be the target, which would tell pairwise methods something.
    others = [other for other in rng.permutation(100).tolist() if other != target]
    numbers = {name: target if name == language else others.pop() for name in plan.languages}
    order = rng.permutation(len(plan.languages))
    text = "_".join(number_name(numbers[plan.languages[i]], plan.languages[i]) for i in order)

    facts = {
        "class": f"{target:02d}",
        "language": language,
        "spoken": f"{clip.number:02d}",
        "voice": clip.voice,
        "speed": clip.speed,
        "pitch": clip.pitch,
        "scans": scans,
        "numbers": {name: f"{value:02d}" for name, value in numbers.items()},
    }
    return {
        "__key__": f"{index:08d}",
        "png": png.getvalue(),
        "flac": files[ends[number] : ends[number + 1]],
        "txt": text.encode(),
        "json": json.dumps(facts, sort_keys=True).encode(),
    }
