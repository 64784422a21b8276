# ruff: noqa: SIM905 - word lists read better as text
"""Abbreviations by what their full stop says about a sentence, in lower case without it."""

BEFORE_NAMES = frozenset(
    "dr mr mrs ms messrs mx prof rev fr hon col lt sgt capt cpl cmdr maj adm gov pres supt insp mt "
    "sr sra dra srta ud uds mme mlle e.g i.e cf vs viz approx bzw z.b d.h p.ej".split()
)
"""Their full stop never ends a sentence."""

IN_SENTENCES = frozenset(
    "inc ltd co corp bros llc plc etc al jr esq a.m p.m pm ph.d m.d b.a m.a b.sc m.sc st ave rd "
    "blvd hwy jan feb apr jun jul aug sep sept oct nov dec mon tue tues thu thurs fri dept univ "
    "gen rep sen ft est ext".split()
)
"""Their full stop ends a sentence if one of `STARTERS` follows."""

BEFORE_NUMBERS = frozenset("no nos fig figs vol vols ch chap sec sect art eq pp ref pt pg".split())
"""Their full stop ends no sentence before a number; otherwise as in `IN_SENTENCES`, but for words
of their own, which end one."""

STARTERS = frozenset(
    "the a an he she it they we you i this that these those there here his her its their our my "
    "your but and so or then when while if as at in on for with from by to after before since "
    "until although though because however also what why how who where which yes no not now all "
    "some most many each every one two another other such even still yet nobody everyone "
    "everybody someone nothing everything please let do did does is are was were can could "
    "would should will may might have has had once meanwhile next finally first".split()
)
"""Words that begin sentences more often than names."""
