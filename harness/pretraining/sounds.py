"""The audio that the tiny audio encoder is pre-trained on: pseudo-words from a formant synthesizer.

A source (a train of glottal pulses, noise, or both) goes through the resonances of a vocal tract that moves from
phoneme to phoneme. Every utterance has its own random speaker, room and recorder. Formants of the
vowels are the men's means of Peterson and Barney (1952, https://doi.org/10.1121/1.1906875), those of consonants are
near the loci of Klatt (1980, https://doi.org/10.1121/1.383940). No recordings of people are used.

    "s ih p r ow" at 96 Hz in a small room, with the label of every 20 ms: s s s s s s ih ih ih ih p p p r r …

Shapes: S samples at 16 kHz, T frames of 8 ms, K frequencies, L labels of 20 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import gaussian_filter1d
from scipy.signal import fftconvolve, istft, resample_poly, stft

Array = npt.NDArray[np.float64]
RATE = 16_000  # Hz
LABEL_S = 0.02

_N_FFT, _HOP = 512, 128
_FRAME_S = _HOP / RATE
_FREQUENCIES_K = np.fft.rfftfreq(_N_FFT, 1 / RATE)


class Phone(NamedTuple):
    """The synthesizer's parameters of a phoneme."""

    formants: tuple[float, float, float]  # Hz, of a man
    voice: float = 0.0  # amplitude of the glottal source
    noise: float = 0.0  # amplitude of the frication noise
    peak: float = 0.0  # Hz, where that noise is strongest
    spread: float = 1.0  # Hz, standard deviation around it
    breath: float = 0.0  # amplitude of aspiration noise, which is filtered by the formants
    damping: float = 1.0  # factor on the bandwidths
    seconds: tuple[float, float] = (0.06, 0.16)


def _vowel(f1: float, f2: float, f3: float) -> Phone:
    return Phone((f1, f2, f3), voice=1.0, breath=0.02)


_VOWELS = {
    "iy": _vowel(270, 2290, 3010), "ih": _vowel(390, 1990, 2550), "eh": _vowel(530, 1840, 2480),
    "ae": _vowel(660, 1720, 2410), "aa": _vowel(730, 1090, 2440), "ao": _vowel(570, 840, 2410),
    "uh": _vowel(440, 1020, 2240), "uw": _vowel(300, 870, 2240), "ah": _vowel(640, 1190, 2390),
    "er": _vowel(490, 1350, 1690),
}  # fmt: skip
_GLIDES = {
    "w": Phone((290, 610, 2150), voice=0.6, seconds=(0.04, 0.09)),
    "y": Phone((260, 2070, 3020), voice=0.6, seconds=(0.04, 0.09)),
    "r": Phone((310, 1060, 1380), voice=0.6, seconds=(0.04, 0.1)),
    "l": Phone((310, 1050, 2880), voice=0.6, seconds=(0.04, 0.1)),
}
_NASALS = {
    "m": Phone((270, 1100, 2130), voice=0.5, damping=2.5, seconds=(0.05, 0.14)),
    "n": Phone((280, 1500, 2470), voice=0.5, damping=2.5, seconds=(0.05, 0.14)),
}
_FRICATIVES = {
    "f": Phone((340, 1100, 2080), noise=0.12, peak=4500, spread=4000, seconds=(0.06, 0.15)),
    "th": Phone((320, 1290, 2540), noise=0.1, peak=6000, spread=2500, seconds=(0.06, 0.14)),
    "s": Phone((320, 1390, 2530), noise=0.5, peak=5800, spread=1300, seconds=(0.07, 0.18)),
    "sh": Phone((300, 1840, 2750), noise=0.5, peak=3200, spread=900, seconds=(0.07, 0.17)),
    "v": Phone((220, 1100, 2080), voice=0.35, noise=0.06, peak=4500, spread=4000, seconds=(0.04, 0.1)),
    "z": Phone((240, 1390, 2530), voice=0.3, noise=0.3, peak=5800, spread=1300, seconds=(0.06, 0.13)),
    "h": Phone((500, 1500, 2500), breath=0.25, seconds=(0.04, 0.1)),
}
# The burst after a closure; the closure itself is silent or voiced.
_PLOSIVES = {
    "p": Phone((400, 1100, 2150), noise=0.25, peak=700, spread=1500),
    "t": Phone((400, 1600, 2600), noise=0.5, peak=4200, spread=1300),
    "k": Phone((300, 1990, 2850), noise=0.5, peak=2000, spread=500),
    "b": Phone((200, 1100, 2150), voice=0.15, noise=0.2, peak=600, spread=1200),
    "d": Phone((200, 1600, 2600), voice=0.15, noise=0.4, peak=3900, spread=1300),
    "g": Phone((200, 1990, 2850), voice=0.15, noise=0.4, peak=1900, spread=500),
}
_PHONES = _VOWELS | _GLIDES | _NASALS | _FRICATIVES | _PLOSIVES
LABELS = ("silence", *_PHONES)

_DIPHTHONGS = (("eh", "iy"), ("aa", "iy"), ("ao", "uw"), ("aa", "uw"), ("ao", "iy"), ("ah", "uw"))
_CLUSTERS = (
    ("s", "t"),
    ("s", "p"),
    ("s", "k"),
    ("t", "r"),
    ("k", "w"),
    ("f", "r"),
    ("th", "r"),
    ("p", "l"),
    ("k", "r"),
)
_ENDINGS = (("k", "s"), ("n", "t"), ("s", "t"), ("n", "d"), ("t", "s"), ("l", "f"), ("r", "z"), ("n", "z"))


@dataclass(frozen=True)
class Utterance:
    """A pseudo-word, and the phoneme of every 20 ms."""

    samples: npt.NDArray[np.float32]  # (S,), 16 kHz
    labels: npt.NDArray[np.int64]  # (L,), L = ceil(S / 320); index in LABELS


class _Segment(NamedTuple):
    name: str  # of LABELS
    phone: Phone
    seconds: float


def pseudo_word(rng: np.random.Generator) -> list[str]:
    """One to three syllables of random phonemes: consonants, a vowel or two, consonants."""
    consonants = (*_GLIDES, *_NASALS, *_FRICATIVES, *_PLOSIVES)
    word: list[str] = []
    for _ in range(rng.choice((1, 2, 3), p=(0.55, 0.35, 0.1))):
        if rng.random() < 0.85:
            word += _CLUSTERS[rng.integers(len(_CLUSTERS))] if rng.random() < 0.2 else (str(rng.choice(consonants)),)
        word += (
            _DIPHTHONGS[rng.integers(len(_DIPHTHONGS))] if rng.random() < 0.35 else (str(rng.choice(tuple(_VOWELS))),)
        )
        if rng.random() < 0.55:
            word += _ENDINGS[rng.integers(len(_ENDINGS))] if rng.random() < 0.25 else (str(rng.choice(consonants)),)
    return word


def utterance(rng: np.random.Generator) -> Utterance:
    """Synthesize a pseudo-word with a random speaker, room and recorder."""
    segments = _segments(pseudo_word(rng), rng)
    ends = np.cumsum([segment.seconds for segment in segments])
    count = int(ends[-1] * RATE)
    spoken_S = _speak(segments, ends, rng)[:count]
    middles_L = (np.arange(math.ceil(count / (LABEL_S * RATE))) + 0.5) * LABEL_S
    names_L = np.searchsorted(ends, middles_L).clip(max=len(segments) - 1)
    indices = np.array([LABELS.index(segment.name) for segment in segments])
    return Utterance(_record(spoken_S, rng).astype(np.float32), indices[names_L])


def _segments(word: list[str], rng: np.random.Generator) -> list[_Segment]:
    """The sounds of a word with random durations; a plosive is a closure, a burst and, if unvoiced, aspiration."""
    silence = Phone((500, 1500, 2500))
    edge = (0.0, rng.exponential(0.06)) if rng.random() < 0.7 else (rng.uniform(0, 0.3), rng.uniform(0, 0.3))
    speed = float(np.exp(rng.normal(-0.2, 0.3)))
    said = [_Segment("silence", silence, edge[0])]
    for name in word:
        phone = _PHONES[name]
        if name in _PLOSIVES:
            closed = phone._replace(noise=0.0, voice=phone.voice)
            said.append(_Segment(name, closed, rng.uniform(0.03, 0.08) * speed))
            said.append(_Segment(name, phone, rng.uniform(0.008, 0.02)))
            if name in "ptk":
                breath = phone._replace(noise=phone.noise * 0.15, breath=0.2)
                said.append(_Segment(name, breath, rng.uniform(0.01, 0.06)))
        else:
            said.append(_Segment(name, phone, rng.uniform(*phone.seconds) * speed))
    said.append(_Segment("silence", silence, edge[1]))
    return [segment for segment in said if segment.seconds > 0]


def _speak(segments: list[_Segment], ends: Array, rng: np.random.Generator) -> Array:
    """The radiated sound, slightly longer than the segments: sources through moving resonances, frame by frame."""
    frames = int(ends[-1] / _FRAME_S) + 3
    which_T = np.searchsorted(ends, np.arange(frames) * _FRAME_S).clip(max=len(segments) - 1)
    phones = [segment.phone for segment in segments]
    accent = np.exp(rng.normal(0, 0.06, (len(phones), 3)))  # vowels vary from one utterance to the next
    tract = float(np.exp(rng.uniform(-0.1, 0.28)))  # vocal tracts are mostly shorter than the men's of the formant data
    targets = np.array([phone.formants for phone in phones]) * accent * tract * np.exp(rng.normal(0, 0.05, 3))
    glide = rng.uniform(1.5, 4.0)  # frames of coarticulation
    formants_T3 = np.exp(gaussian_filter1d(np.log(targets)[which_T], glide, axis=0, mode="nearest"))

    def over_time(values: list[float], smoothing: float) -> Array:
        held: Array = np.array(values)[which_T]
        return gaussian_filter1d(held, smoothing, mode="nearest") if smoothing else held

    effort_T = _effort(which_T, len(segments), rng)
    voice_T = effort_T * over_time([phone.voice * np.exp(rng.normal(0, 0.25)) for phone in phones], 1.5)
    breath_T = effort_T * over_time([phone.breath for phone in phones], 1.0) + rng.uniform(0, 0.1) ** 2 * 10 * voice_T
    sibilance = np.exp(rng.normal(-0.2, 0.6))
    noise_T = effort_T**0.5 * over_time([phone.noise * sibilance * np.exp(rng.normal(0, 0.4)) for phone in phones], 0.7)
    damping_T = over_time([phone.damping for phone in phones], 1.5)
    peak_T = over_time([phone.peak for phone in phones], 0) * tract**0.5 * np.exp(rng.normal(0, 0.1))
    spread_T = over_time([phone.spread for phone in phones], 0) * np.exp(rng.normal(0, 0.2))

    size = frames * _HOP
    voice_TK, white_TK = _frames(_pulses(size, rng)), _frames(rng.normal(0, 1, size))
    tilt_K = (1 + (_FREQUENCIES_K / 400) ** 2) ** (-0.5 * rng.uniform(0.7, 1.3))
    shape_TK = np.exp(-0.5 * ((_FREQUENCIES_K - peak_T[:, None]) / spread_T[:, None]) ** 2)
    through_TK = voice_T[:, None] * tilt_K * voice_TK[:frames] + 0.6 * breath_T[:, None] * white_TK[:frames]
    sound_TK = through_TK * _resonances(formants_T3, damping_T, tract, rng)
    sound_TK = sound_TK + 0.8 * (noise_T[:, None] * shape_TK * white_TK[:frames])
    _, samples_S = istft(sound_TK.T, RATE, nperseg=_N_FFT, noverlap=_N_FFT - _HOP)
    return np.asarray(samples_S.real)


def _effort(which_T: npt.NDArray[np.int64], segments: int, rng: np.random.Generator) -> Array:
    """Vocal effort per frame: it varies randomly, and often rises from and fades to silence at the ends of the word."""
    frames = len(which_T)
    wander = gaussian_filter1d(rng.normal(0, 1, frames + 40), 12)[20:-20] * rng.uniform(0, 2.5)
    spoken = np.flatnonzero((which_T > 0) & (which_T < segments - 1))
    first, last = (spoken[0], spoken[-1]) if len(spoken) else (0, frames - 1)
    place_T = np.arange(frames)
    swell = np.clip((place_T - first + 1) / rng.uniform(1, 8), 0.05, 1)
    fade = np.clip((last - place_T + 1) / rng.uniform(1, 18), 0.02, 1)
    effort: Array = np.exp(wander) * swell * fade
    return effort


def _frames(samples_S: Array) -> npt.NDArray[np.complex128]:
    _, _, spectrum_KT = stft(samples_S, RATE, nperseg=_N_FFT, noverlap=_N_FFT - _HOP)
    return np.asarray(spectrum_KT).T


def _pulses(size: int, rng: np.random.Generator) -> Array:
    """Glottal pulses: pitch that falls over the utterance, wanders, and jitters from pulse to pulse."""
    start = float(np.exp(rng.uniform(np.log(75), np.log(260))))
    knots = np.cumsum(rng.normal(-0.03, 0.06, max(2, size // 1600 + 2)))
    if rng.random() < 0.3:
        knots[-3:] -= rng.uniform(0.2, 0.7)  # a creak at the end
    pitch_S = start * np.exp(np.interp(np.arange(size) / 1600, np.arange(len(knots)), knots))
    phase_S = np.cumsum(pitch_S / RATE) + rng.random()
    places = np.flatnonzero(np.diff(np.floor(phase_S)) > 0)
    # Pulses fall between samples, otherwise the pitch would be quantised; the level does not depend on the pitch.
    late = (phase_S[places + 1] % 1) / (pitch_S[places + 1] / RATE)
    height = np.sqrt(RATE / pitch_S[places]) * np.exp(rng.normal(0, 0.06, len(places)))
    pulses_S = np.zeros(size + 1)
    pulses_S[places + 1] += height * (1 - late)
    pulses_S[places] += height * late
    return pulses_S[:size]


def _resonances(
    formants_T3: Array, damping_T: Array, tract: float, rng: np.random.Generator
) -> npt.NDArray[np.complex128]:
    """Transfer function (T, K) of the tract: second-order resonances in a row, with gain 1 at 0 Hz."""
    higher = np.array([3500, 4500, 5500, 6500]) * tract * np.exp(rng.normal(0, 0.04, 4))
    centres_T7 = np.concatenate([formants_T3, np.broadcast_to(higher, (len(formants_T3), 4))], axis=1)
    widths_T7 = (50 + 0.03 * centres_T7) * damping_T[:, None] * rng.uniform(0.8, 1.6)
    response_TK = np.ones((len(centres_T7), len(_FREQUENCIES_K)), dtype=np.complex128)
    for centre_T, width_T in zip(centres_T7.T[:, :, None], widths_T7.T[:, :, None], strict=True):
        pole_T1 = -np.pi * width_T + 2j * np.pi * centre_T
        s_K = 2j * np.pi * _FREQUENCIES_K
        response_TK *= np.abs(pole_T1) ** 2 / ((s_K - pole_T1) * (s_K - pole_T1.conj()))
    return response_TK


def _record(spoken_S: Array, rng: np.random.Generator) -> Array:
    """Simulate a recording: reverberation, a frequency response, noise, and often a band limit of 4 kHz."""
    size = len(spoken_S)
    if rng.random() < 0.6:
        decay_s = rng.uniform(0.03, 0.3)
        tail_S = np.exp(-6.9 * np.arange(int(decay_s * RATE)) / (decay_s * RATE)) * rng.normal(
            0, 1, int(decay_s * RATE)
        )
        tail_S *= rng.uniform(0.05, 0.6) / np.linalg.norm(tail_S)
        tail_S[0] = 1.0
        spoken_S = fftconvolve(spoken_S, tail_S)[:size]
    spoken_S = _coloured(spoken_S, rng, 4.0)
    spoken_S = spoken_S / np.abs(spoken_S).max()
    level = np.sqrt(np.mean(spoken_S**2)) * 10 ** (-rng.uniform(12, 55) / 20)
    spoken_S = spoken_S + level * _coloured(rng.normal(0, 1, size), rng, 10.0)
    if rng.random() < 0.6:
        spoken_S = resample_poly(resample_poly(spoken_S, 1, 2), 2, 1)[:size]
    loud_S = spoken_S * 10 ** rng.uniform(-2, 0) / np.abs(spoken_S).max()
    return np.asarray(loud_S, dtype=np.float64)


def _coloured(samples_S: Array, rng: np.random.Generator, decibels: float) -> Array:
    """A random smooth frequency response, and a high-pass somewhere below the voice."""
    size = next_fast_len(len(samples_S), real=True)
    frequencies = np.fft.rfftfreq(size, 1 / RATE)
    knots = np.geomspace(60, 8000, 8)
    gain = np.interp(np.log(frequencies + 1), np.log(knots), rng.normal(0, decibels, 8))
    low = rng.uniform(20, 200)
    response = 10 ** (gain / 20) * (frequencies / low) ** 2 / (1 + (frequencies / low) ** 2)
    coloured: Array = irfft(rfft(samples_S, size) * response, size)[: len(samples_S)]
    return coloured
