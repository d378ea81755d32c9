"""Recordings (WAV, FLAC, Ogg, MP3, …) as mono at 16 kHz; three kinds of encoder.

Shapes: S samples, C channels.
"""

from __future__ import annotations

import io
import math
import re
import wave
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from harness.core import hub
from harness.core.errors import UserError
from tasks.base import Modality, Preview
from tasks.containers.audio_streams import Stream, streams
from tasks.modalities.encoders.options import LAST_LAYER, EncoderOptions
from tasks.modalities.encoders.recording import SAMPLING_RATE, Recording

if TYPE_CHECKING:
    import soundfile

    from tasks.encoder import Encoder

TINY = "builtin/tiny-audio"
MAX_SECONDS = 600
_PREVIEW_SECONDS = 10
MAX_SAMPLES = 120_000_000  # of all channels together: 480 MB decoded
MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz

# libsndfile's log messages for a header that promises more bytes, or frames, than the file has.
_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# Those for a file that goes on behind what its header says (AIFF, RF64, W64): more samples, or another recording.
_LONG = re.compile(r"^\s*(?:FORM|Riff size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_NOTES = 4096  # bytes behind the end that may be something else
_SHORT_FRAMES = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
# The formats of libsndfile whose length can be checked, by its names; of others it may silently read less.
FORMATS = {
    "WAV": "WAV", "WAVEX": "WAV", "RF64": "RF64", "W64": "W64", "AIFF": "AIFF", "NIST": "NIST SPHERE", "FLAC": "FLAC",
    "OGG": "Ogg (Vorbis, Opus)", "MP3": "MP3",
}  # fmt: skip
# Programs that write into a pipe, and cannot fill in the real size afterwards, use sizes from here on.
_UNKNOWN_SIZE = 0x7FFF_0000
_UNKNOWN_FRAMES = 2**63 - 1  # SF_COUNT_MAX: a FLAC stream without a length


def _tiny_audio(weights: bool) -> Encoder:
    from tasks.modalities.encoders.tiny_audio import TinyAudio

    return TinyAudio.load(Path(hub.resolve(TINY)), weights)


class Audio(Modality):
    """A recording, its channels averaged, resampled to 16 kHz."""

    default_encoder: ClassVar = TINY
    built_in: ClassVar = {TINY: _tiny_audio}
    EncoderConfig: ClassVar = EncoderOptions

    def load(self, path: Path) -> Recording:
        """Decode the whole recording.

        Raises:
            UserError: the file is missing, shorter than its header says, too long (``MAX_SECONDS``, ``MAX_SAMPLES``),
                has no samples or ones that are not finite, or has a format that is not in ``FORMATS``.
        """
        import soundfile

        if not path.is_file():
            raise UserError(f"{path}: {'a folder, not a recording' if path.is_dir() else 'no such file'}")
        try:
            with soundfile.SoundFile(path) as file:
                _check_header(path, file)
                rate, promised = file.samplerate, file.frames
                parts = streams(path, file.format, promised, MAX_SECONDS)
                if parts is None:
                    samples_SC = file.read(dtype="float32", always_2d=True)
            if parts is not None:
                samples_SC, promised = _joined(path, parts, rate), 0
        except UserError:
            raise
        except Exception as error:  # soundfile's own, and those caused by invalid headers
            raise UserError(f"{path}: cannot be decoded as audio: {error}") from error
        frames, channels = samples_SC.shape
        if frames < promised:
            raise UserError(f"{path}: truncated: its header promises {promised:,} frames, {frames:,} can be decoded")
        if frames == 0:
            raise UserError(f"{path}: has no samples")
        if not np.isfinite(samples_SC).all():
            raise UserError(f"{path}: has samples that are NaN or infinite")
        return Recording(_resample(samples_SC.mean(axis=1), rate), rate, channels)

    def pretrained(
        self, name: str, weights: bool, trust_remote_code: bool, options: EncoderOptions = LAST_LAYER
    ) -> Encoder:
        """Whisper's encoder, or the Audio Spectrogram Transformer.

        Raises:
            UserError: it could not be loaded, is not an audio encoder, or has no such layer.
        """
        from tasks.modalities.encoders import pretrained_audio

        return (pretrained_audio.load if weights else pretrained_audio.empty)(name, trust_remote_code, options)

    def preview(self, item: Recording) -> Preview:
        """The first ten seconds as the encoders get them, as 16-bit integers."""
        samples_S = item.samples[: _PREVIEW_SECONDS * SAMPLING_RATE]
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLING_RATE)
            file.writeframes(np.round(32767 * np.clip(samples_S, -1, 1)).astype("<i2").tobytes())
        return Preview("wav", buffer.getvalue())

    def remark(self, item: Recording) -> str | None:
        """Report which channels and sampling rate were converted."""
        said = []
        if item.channels > 1:
            said.append(f"{'stereo' if item.channels == 2 else f'{item.channels} channels'}, averaged to mono")
        if item.original_rate != SAMPLING_RATE:
            said.append(f"{item.original_rate:,} Hz, resampled to {SAMPLING_RATE:,} Hz")
        return "; ".join(said) or None


def _joined(path: Path, parts: list[Stream], rate: int) -> npt.NDArray[np.float32]:
    """The samples of all streams of a file, one after the other."""
    import soundfile

    decoded: list[npt.NDArray[np.float32]] = []
    so_far = 0
    for number, part in enumerate(parts, 1):
        with soundfile.SoundFile(io.BytesIO(part.data)) as file:
            _check_header(path, file)
            samples_SC = file.read(dtype="float32", always_2d=True)[part.skip :]
            if decoded and (file.samplerate, file.channels) != (rate, decoded[0].shape[1]):
                kinds = ((rate, decoded[0].shape[1]), (file.samplerate, file.channels))
                found = " and ".join(f"{hertz:,} Hz with {channels} channels" for hertz, channels in kinds)
                raise UserError(f"{path}: joined from different recordings: {found}; convert it")
            if len(samples_SC) < max(part.frames, file.frames - part.skip):
                raise UserError(
                    f"{path}: stream {number} must have {max(part.frames, file.frames - part.skip):,} frames, "
                    f"{len(samples_SC):,} can be decoded"
                )
        so_far += len(samples_SC)
        if so_far > MAX_SECONDS * rate or so_far * samples_SC.shape[1] > MAX_SAMPLES:
            raise UserError(f"{path}: more than {so_far / rate:,.0f} s long; allowed: at most {MAX_SECONDS} s")
        decoded.append(samples_SC)
    return np.concatenate(decoded)


def _check_header(path: Path, file: soundfile.SoundFile) -> None:
    """Reject files whose header is already wrong, before memory is allocated for them.

    libsndfile reads a truncated WAV file as a shorter recording, and reports it in its log only.
    """
    rate, frames = file.samplerate, file.frames
    if file.format not in FORMATS or ("MPEG" in file.subtype and file.format != "MP3"):
        allowed = ", ".join(dict.fromkeys(FORMATS.values()))
        kind = f"{file.format_info} of {file.subtype_info}"
        raise UserError(f"{path}: its format is {kind}; allowed: {allowed}; convert it")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UserError(f"{path}: sampling rate {rate:,} Hz; allowed: {MIN_RATE:,} to {MAX_RATE:,} Hz")
    if frames == _UNKNOWN_FRAMES:
        raise UserError(f"{path}: its header does not give its length (written into a pipe?); convert it again")
    if frames > MAX_SECONDS * rate:
        raise UserError(f"{path}: {frames / rate:,.0f} s long; allowed: at most {MAX_SECONDS} s")
    if frames * file.channels > MAX_SAMPLES:
        raise UserError(
            f"{path}: {frames:,} frames × {file.channels} channels; allowed: {MAX_SAMPLES:,} samples in all"
        )
    for promised, found in _SHORT.findall(file.extra_info):
        if int(found) < int(promised) < _UNKNOWN_SIZE:
            raise UserError(
                f"{path}: truncated: its header promises {int(promised):,} bytes of samples, there are {int(found):,}"
            )
    for promised, found in _LONG.findall(file.extra_info):
        if int(found) > int(promised) + _NOTES:
            raise UserError(
                f"{path}: its header promises {int(promised):,} bytes, there are {int(found):,}; convert it"
            )
    if frame_counts := _SHORT_FRAMES.search(file.extra_info):
        found, promised = map(int, frame_counts.groups())
        raise UserError(f"{path}: truncated: its header promises {promised:,} frames, there are {found:,}")


def _resample(samples_S: npt.NDArray[np.float32], rate: int) -> npt.NDArray[np.float32]:
    """To ``SAMPLING_RATE``, through the anti-aliasing filter of ``scipy.signal.resample_poly``."""
    if rate == SAMPLING_RATE:
        return samples_S
    from scipy.signal import resample_poly

    common = math.gcd(rate, SAMPLING_RATE)
    return resample_poly(samples_S, SAMPLING_RATE // common, rate // common).astype(np.float32)
