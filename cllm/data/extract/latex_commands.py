"""What the commands of LaTeX stand for in Markdown."""

HEADINGS = {"part": 1, "chapter": 1, "section": 2, "subsection": 3, "subsubsection": 4, "paragraph": 5, "subparagraph": 6}
STYLES = {"emph": "*", "textit": "*", "textsl": "*", "textbf": "**", "texttt": "`", "verb": "`"}
# Commands whose arguments are none of the text, and how many arguments they have.
_NOTHING = {
    0: """
        maketitle tableofcontents listoffigures listoftables clearpage newpage pagebreak cleardoublepage noindent indent centering raggedright
        bigskip medskip smallskip hfill vfill hline toprule midrule bottomrule par small large Large LARGE huge Huge tiny footnotesize scriptsize
        normalsize bfseries itshape rmfamily sffamily ttfamily mdseries upshape slshape scshape em bf it rm sf tt appendix frontmatter mainmatter
        backmatter printbibliography makeatletter makeatother protect relax leavevmode sloppy fussy boldmath displaystyle item null newline
        linebreak
    """,
    1: """
        label ref pageref eqref autoref cref Cref nameref vref input include includegraphics bibliography bibliographystyle usepackage
        documentclass pagestyle thispagestyle vspace hspace index nocite graphicspath pagenumbering hypersetup title author date thanks
        hyphenation cline cmidrule newcounter stepcounter refstepcounter RequirePackage addbibresource geometry definecolor bibitem subfile
        includeonly phantom hphantom vphantom cite citep citet citealp citeauthor citeyear parencite textcite autocite footcite fontsize
        selectlanguage color lstset tikzset
    """,
    2: """
        setlength addtolength setcounter addtocounter newtheorem renewenvironment markboth rule resizebox addcontentsline DeclareMathOperator
        fancyhead fancyfoot
    """,
}
DROPPED = {name: count for count, names in _NOTHING.items() for name in names.split()}
SECOND_IS_TEXT = ("href", "textcolor", "colorbox", "raisebox", "foreignlanguage", "parbox", "scalebox")
SIGNS = {
    "ldots": "\u2026", "dots": "\u2026", "textellipsis": "\u2026", "LaTeX": "LaTeX", "TeX": "TeX", "ss": "\u00df", "ae": "\u00e6", "AE": "\u00c6",
    "oe": "\u0153", "OE": "\u0152", "aa": "\u00e5", "AA": "\u00c5", "o": "\u00f8", "O": "\u00d8", "l": "\u0142", "L": "\u0141", "i": "\u0131",
    "S": "\u00a7", "P": "\u00b6", "copyright": "\u00a9", "pounds": "\u00a3", "euro": "\u20ac", "textbackslash": "\\", "textasciitilde": "~",
    "textendash": "\u2013", "textemdash": "\u2014", "quad": " ", "qquad": " ", "textbullet": "\u2022", "slash": "/", "textregistered": "\u00ae",
    "textdegree": "\u00b0", "textquotesingle": "'", "textunderscore": "_", "space": " ", "dag": "\u2020", "ddag": "\u2021",
}  # fmt: skip
ACCENTS = {
    "'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303", "=": "\u0304", ".": "\u0307", "c": "\u0327", "v": "\u030c",
    "u": "\u0306", "H": "\u030b", "k": "\u0328", "r": "\u030a", "d": "\u0323", "b": "\u0331",
}  # fmt: skip
