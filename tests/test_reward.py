"""The checker: no false reward, no missed answer, no exception, no delay (in processor time, which does not
depend on other processes).

The table has one case per line: `=` (equal) or `!` (not), gold ;; prediction ;; why. It is ordered by rule.
`python tests/test_reward.py --fuzz 1000000` runs the fuzz test at full size.
"""

import json
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from reward import MAX_DEPTH, MAX_LENGTH, answers_equal, extract_answers, score
from reward_rewrites import changing, keeping

SHARED = Path(__file__).parents[2] / "shared"
EXAMPLES = SHARED / "checker" / "examples.jsonl"
BENCHMARKS = SHARED / "benchmarks"

TABLE = r"""
# integers and decimals
= 5 ;; 5 ;; the plainest case
= 5 ;; +5 ;; a plus sign
= 5 ;; 05 ;; zero-padded prediction
= 025 ;; 25 ;; zero-padded gold, as AIME has them
= 5 ;; 5. ;; a full stop
= 5 ;; 5, ;; a trailing comma
= 5 ;; 5.000 ;; trailing zeros
= 5 ;;   5   ;; spaces around it
= 0 ;; -0 ;; minus zero is zero
= 0 ;; 0.00 ;; zero with decimals
= .5 ;; 0.5 ;; no leading zero
= -.5 ;; -0.50 ;; sign and no leading zero
= 5 ;; --5 ;; two signs
= 5 ;; -(-5) ;; two signs and brackets
= 9007199254740993 ;; 9007199254740993 ;; beyond 2^53
! 9007199254740993 ;; 9007199254740992 ;; equal as floats
! 123456789012345678901234567890 ;; 123456789012345678901234567891 ;; equal as floats, 30 digits
! 5 ;; 55 ;; a substring is not equality
! 55 ;; 5 ;; nor the other way round
! 5 ;; -5 ;; sign
! 5 ;; 5.0000001 ;; no absolute tolerance
! 0 ;; 0.0000001 ;; no absolute tolerance near zero
! 0 ;; 1e-12 ;; no absolute tolerance near zero, scientific
! 0.1 ;; 0.10000000001 ;; two decimals are compared exactly
! 100000000 ;; 100000000.3 ;; agreeing digits do not help two decimals
! 5 ;; 5- ;; a stray sign
! 16 ;; 0x10 ;; Python's hexadecimal is not an answer
! 1000 ;; 1_000 ;; Python's underscore is not an answer
! 3 ;; ٣ ;; Arabic digits, which int() takes
! 5 ;; nan ;; float("nan")
! 5 ;; None ;; the word
! 12 ;; 1 2 ;; two numbers
! 12 ;; 1\,2 ;; a thin space groups threes only
! 1.5 ;; 1.5.0 ;; no number

# thousands
= 1234 ;; 1,234 ;; comma
= 1,234 ;; 1234 ;; comma in the gold, as in GSM8K
= 114,200 ;; 114200 ;; two groups of three in the gold, as in GSM8K
= 1234567 ;; 1,234,567 ;; two commas
= 1234 ;; 1{,}234 ;; LaTeX comma
= 1234567 ;; 1{,}234{,}567 ;; two of them
= 10080 ;; 10,\!080 ;; MATH's comma
= 11,\! 111,\! 111,\! 100 ;; 11111111100 ;; MATH's comma and spaces
= 1234 ;; 1\,234 ;; thin space
= 1234 ;; 1\ 234 ;; control space
= 1234 ;; 1~234 ;; tie
= 1234 ;; 1 234 ;; plain space
= 1234567 ;; 1 234 567 ;; two plain spaces
= 1234.5 ;; 1,234.5 ;; comma and decimals
= 1000 ;; \$1,000.00 ;; currency, comma and cents
= -1234 ;; -1,234 ;; comma and sign
= 100,200 ;; 100, 200 ;; the other side says it is a list
= 100,200 ;; 200,100 ;; so does this, in another order
= 100200 ;; 100,200 ;; the other side says it is one number
! 123 ;; 1,2,3 ;; no groups of three: a list
! 1234 ;; 12,34 ;; no groups of three
! 12345 ;; 1,2345 ;; four digits are no group
! 1234 ;; 1, 234 ;; a space: a list
! 1234 ;; (1,234) ;; in brackets: a tuple
! 1234 ;; \{1,234\} ;; in brackets: a set
! 1,000 ;; 1,0 ;; a group that begins with 0 is not an item of a list
! 1234 ;; 1,235 ;; another number

# fractions and mixed numbers
= 1/2 ;; \frac{1}{2} ;; LaTeX
= 1/2 ;; \dfrac{1}{2} ;; display style
= 1/2 ;; \tfrac12 ;; text style without braces
= 1/2 ;; \cfrac{1}{2} ;; continued
= 1/2 ;; \frac12 ;; no braces
= 1/2 ;; \frac 12 ;; no braces and a space
= 1/2 ;; \frac1{2} ;; half the braces
= 1/2 ;; \frac{1}2 ;; the other half
= 1/2 ;; {1 \over 2} ;; TeX's own fraction
= 1/2 ;; 1 \over 2 ;; without braces
= 1/2 ;; \dfrac12 ;; display style without braces
= -7\frac12 ;; -7.5 ;; mixed without braces
= \frac9{19} ;; 9/19 ;; a gold of MATH-500
= \frac{270}7 ;; 270/7 ;; another
= 1/2 ;; 2/4 ;; not reduced
= 1/2 ;; 0.5 ;; exact decimal
= 1/2 ;; .5 ;; exact decimal without zero
= 1/2 ;; 1 / 2 ;; spaces
= 1/2 ;; 1÷2 ;; division sign
= 1/2 ;; 1⁄2 ;; fraction slash
= 1/2 ;; ½ ;; one character
= 2 ;; 4/2 ;; an integer in the end
= 1/6 ;; 1/2/3 ;; from left to right
! 3/4 ;; \frac{\frac{3}{2}}{2} ;; nested
= 1/2 ;; \frac{0.5}{1} ;; decimal inside
= -1/2 ;; \frac{-1}{2} ;; sign above
= -1/2 ;; \frac{1}{-2} ;; sign below
= -1/2 ;; -\frac{1}{2} ;; sign in front
= -1/2 ;; - \frac{1}{2} ;; sign and a space
= 1/2 ;; -\frac{1}{-2} ;; two signs
= -3./2 ;; -1.5 ;; a gold of Minerva
= 1\frac{4}{5} ;; 1.8 ;; mixed gold of MATH-500
= 1\frac{4}{5} ;; 9/5 ;; mixed and improper
= 137 \frac{1}{2} ;; 137.5 ;; mixed with a space
= -2\frac{1}{2} ;; -2.5 ;; the sign is that of the whole
= 2.5 ;; 2 1/2 ;; plain mixed
= 2.5 ;; 2½ ;; mixed, one character
= \frac{2\pi}{3} ;; 2\frac{\pi}{3} ;; a product, for the numerator is not an integer
= \frac{1}{0} ;; \frac{1}{0} ;; without a value, yet the same text
! 1\frac{1}{2} ;; \frac{1}{2} ;; not the product of 1 and 1/2
! 11/2 ;; 1 1/2 ;; dropping the space would make it 11/2
! 1/2 ;; 2/1 ;; upside down
! 1/2 ;; -1/2 ;; sign
! \frac{3}{4} ;; \frac{3}{-4} ;; sign below
! 1/3 ;; 0.333 ;; cut too early
! 1/3 ;; 0.33 ;; cut earlier
! 0.33 ;; 1/3 ;; the gold is the decimal
! 1/2 ;; 50 ;; a hundred times too large
! \frac{1}{0} ;; \frac{2}{0} ;; no values, other texts
! 0 ;; \frac{1}{0} ;; no value
! 12:30 ;; 12/30 ;; a time of day
! 3:4 ;; 3/4 ;; a ratio is text
= 3:4 ;; 3 : 4 ;; the same ratio
= 1/3 ;; 0.3333333333 ;; ten digits, cut off
= 2/3 ;; 0.66666667 ;; eight digits, rounded
! 2/3 ;; 0.6666667 ;; seven digits are too few
! 5/4 ;; 1.2500000001 ;; many digits, but not its own
! \frac{24691357}{2} ;; 12345678 ;; an integer is not a rounded decimal

# scientific notation
= 4.5e33 ;; 4.5E33 ;; capital
= 4.5e33 ;; 4.5 \times 10^{33} ;; 58 golds of Minerva
= 4.5e33 ;; 4.5 \cdot 10^{33} ;; dot
= 4.5e33 ;; 4.5*10^33 ;; plain text
= 4.5e33 ;; 4.5 × 10³³ ;; Unicode
= 4.5e33 ;; 4.5 \times 10^33 ;; ten's exponent without braces
= 4.5e33 ;; 45 \times 10^{32} ;; another mantissa
= 4.5e33 ;; 4.5\times10^{33}\text{ erg/s} ;; with a unit
= 1e11 ;; 10^{11} ;; no mantissa
= 1e-5 ;; 10^{-5} ;; negative exponent
= 1e-5 ;; 10^-5 ;; without braces
= 1e-5 ;; 0.00001 ;; written out
= 1.70e4 ;; 17,000 ;; trailing zero and comma
= .0000672 ;; 6.72\times10^{-5} ;; a gold of MATH-500
= 1000 ;; 1e3 ;; an integer
= 1000 ;; 10^3 ;; a power
! 4.5e33 ;; 4.5 \times 10^{32} ;; exponent
! 2.55e-10 ;; 2.65e-10 ;; an absolute tolerance would take it
! 1e-8 ;; 1e-9 ;; so here
! 1e-400 ;; 0 ;; underflow
! 1e-400 ;; 1e-401 ;; two underflows
! 4.5e33 ;; 4.5 ;; the power is missing

# percent
= 50\% ;; 50\% ;; both with the sign
= 50\% ;; 50% ;; without the backslash
= 50\% ;; 0.5 ;; its value
= 50\% ;; 1/2 ;; its value as a fraction
= 50\% ;; 50 ;; the sign may be lost
= 50 ;; 50\% ;; or added
= 0.5 ;; 50\% ;; its value
= 8 \% ;; 8 ;; a gold of OlympiadBench
= 62.5% ;; 5/8 ;; another
= 12.5\% ;; 0.125 ;; exact
= 50\% ;; 50 percent ;; the word
= 50\% ;; 50\text{ percent} ;; the word in \text
! 0.5 ;; 50 ;; neither has the sign
! 50 ;; 0.5 ;; neither, the other way
! 50\% ;; 5\% ;; both have it
! 50\% ;; 0.5\% ;; both have it: no second reading
! 5\% ;; 0.5 ;; ten times too large
! 1/3 ;; 33\% ;; rounded

# units, degrees, currency
= 5 ;; 5\text{ cm} ;; unit
= 5 ;; 5 \mathrm{~m} ;; unit as OCR writes it
= 5 ;; 5\ \text{m/s} ;; a ratio of units
= 5 ;; 5\text{ m}\cdot\text{s}^{-1} ;; a product of units
= 5 ;; 5\;\mathrm{cm}^{2} ;; a unit's power
= 15\mbox{ cm}^2 ;; 15 ;; a gold of MATH-500
= 864 \mbox{ inches}^2 ;; 864\text{ square inches} ;; two spellings of a unit
= 5 ;; 5 cm ;; plain unit
= 5 ;; 5cm ;; plain, no space
= 5 ;; 5 cm^2 ;; plain, with a power
= 5 ;; 5 apples ;; what is counted
= 5 ;; 5 m ;; one letter that is a unit
= 5 ;; 5 m/s ;; a ratio of units
= 5 ;; 5 km/h ;; another
= 5 ;; 5 \text{ m}^2 ;; a power
= 5 ;; 5 cm² ;; a power, one character
= 5 ;; 5 square feet ;; two words
= 20 ;; 20 dollars per hour ;; three words
= 5 ;; 5\text{ apples} ;; what is counted
= 5.4 \text{ cents} ;; 5.4 ;; unit in the gold
= \frac{270}7\text{ degrees} ;; \frac{270}{7} ;; unit after a fraction
= 3\sqrt{13} ;; 3\sqrt{13}\text{ units} ;; unit after a root
= 90 ;; 90^\circ ;; degrees
= 90 ;; 90^{\circ} ;; degrees in braces
= 90 ;; 90° ;; the character
= 90 ;; 90 degrees ;; the word
= 106^\circ ;; 106 ;; degrees in the gold
= 5 ;; 5^\circ\text{C} ;; Celsius
= 5 ;; 5°C ;; Celsius, characters
= \$18.90 ;; 18.90 ;; currency in the gold
= 18.90 ;; \$18.90\text{ dollars} ;; sign and word
= \$32,\!348 ;; 32348 ;; currency and comma
= 36 ;; €36 ;; another currency
= 36 ;; 36 dollars ;; the word
= 2/3 ;; 2/3\text{ } ;; an empty \text
= 5 ;; 5 \text{.} ;; a full stop in \text
! 15\mbox{ cm}^2 ;; 225 ;; the power belongs to the unit
! 5 ;; 5\text{ or 6} ;; a hedge behind \text
! 5 ;; 5 \text{ or more} ;; a hedge without a number
! 5 ;; 5\text{ million} ;; a word that multiplies
! 5 ;; 5 million ;; the same, plain
! 5 ;; 5 thousand ;; another
! 5 ;; 5\text{ hundred} ;; another
! 5 ;; 5\text{ not sure} ;; doubt
! 5 ;; \text{about } 5 ;; doubt in front
! 12 ;; 12 (approximately) ;; doubt in brackets
! 5 ;; 5x ;; a variable is not a unit
! 5 ;; 5 n ;; nor after a space
! 5 ;; 5\text{ (wrong)} ;; a remark
! 5 ;; at least 5 ;; a bound
! 6m ;; 6 ;; a bare letter is a variable
! 2n ;; 2 ;; a variable in the gold
! 3x\text{ cm} ;; 3 ;; a unit does not take the variable along
! 90 ;; \frac{\pi}{2} ;; degrees are not radians

# equations
= x=5 ;; 5 ;; left side in the gold
= 5 ;; x = 5 ;; left side in the prediction
= x=5 ;; x = 5 ;; in both
= 5 ;; 5 = x ;; turned round
= 5 ;; x \approx 5 ;; about equal
= 5 ;; n = 5 ;; any letter
= 5 ;; \theta = 5 ;; Greek
= 5 ;; x_1 = 5 ;; with a subscript
= 5 ;; \text{Area} = 5 ;; a name in \text
= 5 ;; Area = 5 ;; a plain name
= 5 ;; = 5 ;; nothing on the left
= 5 ;; 2+3=5 ;; a true equation between numbers
= 5 ;; x = 2+3 = 5 ;; a chain
= f(x)=2x ;; 2x ;; a function's name
= f(n) = 2 n+1007 ;; 2n+1007 ;; a gold of OlympiadBench
= m_{\max }=n^{2}-n-1 ;; n^2-n-1 ;; a subscript in the name
= (x,y)=(1,2) ;; (1,2) ;; a tuple of names
= y = 2x + 3 ;; y=2x+3 ;; spaces
= y = 2x + 3 ;; 2x - y + 3 = 0 ;; the same line
= 5x - 7y + 11z + 4 = 0 ;; -5x+7y-11z-4=0 ;; times -1
= y'+y=0 ;; y^{\prime}+y=0 ;; a prime in two spellings
= x=3,y=4 ;; (3,4) ;; names in front of each
! SRAC=LRAC ;; LRAC ;; an equation of two names is not one of them
! f(x)=x ;; g(x)=x ;; another function
! y = 2x + 3 ;; y=2x-3 ;; sign
! y = 2x + 3 ;; y=3x+3 ;; slope
! 5x - 7y + 11z + 4 = 0 ;; 5x-7y+11z-4=0 ;; constant
! x=5 ;; y=5 ;; two different names
! x=5 ;; x=6 ;; another value
! 5 ;; 2+2=5 ;; a false equation
! 3 ;; 3 \neq 4 ;; a relation that contains it
! 3 ;; x \ne 3 ;; its contrary
! 1=2 ;; 3=4 ;; constants are not proportional

# numbers of other bases
= 52_8 ;; 52_{8} ;; braces
= 4210_{5} ;; 4210_5 ;; a gold of MATH-500
= 52_8 ;; 52 ;; a dropped base is forgiven
= 52_8 ;; 52₈ ;; a Unicode subscript
! 52_8 ;; 52_9 ;; another base
! 52_8 ;; 53_8 ;; another number
! 52_8 ;; 42 ;; its decimal value was not asked for
! 52_8 ;; 528 ;; the subscript is not a digit
= 1011_2 ;; (1011)_2 ;; brackets
= A3_{16} ;; A3_16 ;; hexadecimal, no braces

# closed forms
= 2^3 ;; 8 ;; power
= 4 ;; (-2)^2 ;; bracketed base
= -4 ;; -2^2 ;; the sign comes last
= 25 ;; 5² ;; superscript character
= 2^{10} ;; 1024 ;; braces
= 2^{1009} ;; 2 \cdot 2^{1008} ;; exact, beyond floats
! 2^{1009} ;; 2^{1008} ;; exact
! 2^{12} ;; 2^12 ;; TeX reads 2^1 2
! 12 ;; 1 2 ;; not joined
= 11\sqrt2 ;; 11\sqrt{2} ;; root without braces
= \sqrt{2} ;; 2^{1/2} ;; root as a power
= \sqrt{2} ;; sqrt(2) ;; plain text
= 2\sqrt{113} ;; 2√113 ;; character
= 3\sqrt{13} ;; \sqrt{117} ;; factor drawn in
= \frac{\sqrt{2}}{2} ;; \frac{1}{\sqrt{2}} ;; rationalised
= \sqrt{19} ;; 1\sqrt{19} ;; factor 1
= \sqrt[3]{7} ;; 7^{1/3} ;; cube root
= \sqrt[3]{-8} ;; -2 ;; the real root
= 2^{0.5} ;; 2^0.5 ;; a decimal exponent without braces
= \tan^{-1}(1) ;; \pi/4 ;; the inverse function
= \arctan 1 ;; \frac{\pi}{4} ;; the same by name
! e^{500}e^{500} ;; e^{600}e^{600} ;; both overflow, yet differ
! \infty ;; 10^{300} ;; large is not infinite
! I(0) ;; 0 ;; an initial value, no product
= \sqrt{16} ;; 4 ;; a square
= \sqrt{2} ;; 1.41421356237 ;; twelve digits
= \pi ;; 3.14159265 ;; nine digits, cut off
= \pi ;; 3.1415927 ;; eight digits, rounded
! \pi ;; 3.14159 ;; six digits
! \sqrt{2} ;; 1.414 ;; four digits
! \sqrt{2} ;; 1.41421357 ;; nine digits, the last wrong
! \pi ;; 22/7 ;; approximation
! \pi ;; 355/113 ;; a better one
! \sqrt{12} ;; \sqrt12 ;; TeX reads the root of 1, times 2
! 5\sqrt{2} ;; 5\sqrt{3} ;; another root
! 2\pi ;; 2 ;; the factor is lost
! 2\pi ;; \pi^2 ;; another power
= 2\pi ;; 2π ;; character
= 2\pi ;; 2 pi ;; plain text
= 18+2\pi ;; 2\pi+18 ;; order of a sum
= \frac{-1+\sqrt{5}}{2} ;; \frac{\sqrt{5}-1}{2} ;; order above the line
= 6 - 5i ;; -5i+6 ;; complex
= 1+\sqrt{3} i ;; 1+i\sqrt{3} ;; a gold of Minerva
! 6 - 5i ;; 6+5i ;; conjugate
! 5 ;; 5i ;; imaginary
= e^2 ;; e^{2} ;; braces
= e^{i\pi} ;; -1 ;; Euler
= \ln 2 + i\pi/3 ;; \frac{i\pi}{3}+\ln 2 ;; a gold of Minerva
= \log_2 8 ;; 3 ;; base
= 2,-\log _{10} 250 ;; -\log_{10}(250), 2 ;; a gold of OlympiadBench
= \frac{\log 2}{\log 2-\log 3} ;; \frac{\ln 2}{\ln 2 - \ln 3} ;; the base cancels
= \sin 30^\circ ;; 1/2 ;; degrees inside a function
= \sin\pi ;; 0 ;; noise of floats
= \cos\frac{\pi}{2} ;; 0 ;; the same
= 5! ;; 120 ;; factorial
= \frac{100!}{2^{50}} ;; 100!/2^{50} ;; exact
! 5! ;; 5 ;; the sign of the factorial
= \binom{5}{2} ;; 10 ;; binomial
! 5 ;; |-5| ;; absolute value
= \lfloor 2.7 \rfloor ;; 2 ;; floor
= \infty ;; +\infty ;; sign
= \infty ;; infinity ;; word
= \infty ;; ∞ ;; character
! \infty ;; -\infty ;; sign
! 0 ;; e^{-1000} ;; underflow of a function
! 0 ;; 1e-400\sqrt{2} ;; underflow of a product
! 3 ;; x ;; a variable has no value

# expressions in variables
= p - q ;; -q+p ;; order
= (a+5)(b+2) ;; (b+2)(a+5) ;; order of factors
= (a+5)(b+2) ;; ab+2a+5b+10 ;; expanded
= n(n-1) ;; n^2-n ;; expanded
= \frac{n(n+1)}{2} ;; \frac{1}{2}n(n+1) ;; factor drawn out
= \frac{n(n+1)}{2} ;; n(n+1)/2 ;; plain
= 2^{k-n} ;; \frac{2^k}{2^n} ;; law of exponents
= \binom{2n}{n} ;; \frac{(2n)!}{(n!)^2} ;; binomial
= \sin^2 x + \cos^2 x ;; 1 ;; identity
= \cot x ;; \frac{\cos x}{\sin x} ;; a gold of MATH-500
= \sqrt{2} \cos (2 t-\pi / 4) ;; \cos 2t + \sin 2t ;; Minerva
= (n-2) 2^{n}+1 ;; 1+2^n(n-2) ;; a number after brackets
= \lfloor\frac{2 n-1}{5}\rfloor ;; \left\lfloor \frac{2n-1}{5} \right\rfloor ;; floor
= \lceil n/2 \rceil ;; \lfloor (n+1)/2 \rfloor ;; equal for whole numbers
= E_{1}+2E_{2} ;; 2E_2+E_1 ;; subscripts
= \lambda_{\text {red}} / \sqrt{2} ;; \frac{\lambda_{\text{red}}}{\sqrt{2}} ;; a word as subscript
= 3R^2 ;; 3 R^{2} ;; braces
= \alpha ;; α ;; character
= \frac{x}{2} ;; 0.5x ;; decimal factor
! x^2 ;; y^2 ;; another variable
! 3R^2 ;; 3r^2 ;; capital and small letters are two variables
! x+1 ;; x-1 ;; sign
! x^{20}+1 ;; x^{20}+2 ;; a small difference
! x^{10} ;; x^10 ;; TeX reads x^1 0
! |x| ;; x ;; a variable may be negative
! \lfloor n/2 \rfloor ;; n/2 ;; floor
! \lceil n/2 \rceil ;; \lfloor n/2 \rfloor+1 ;; differs for even numbers
! E_{1} ;; E_{2} ;; subscript
! \frac{n(n+1)}{2} ;; \frac{n(n-1)}{2} ;; sign
! x \le y ;; y \le x ;; a relation is not a product
! x ;; 5 ;; a number is not a variable

# intervals and inequalities
= (1,2] ;; \left(1,2\right] ;; \left and \right
= (1,2] ;; \bigl(1, 2\bigr] ;; big brackets
= (2,\infty) ;; (2, +\infty) ;; plus
= (-\infty, 0] ;; (-∞,0] ;; character
= x \in [-2,7] ;; [-2,7] ;; name in the gold
= [-2,7] ;; x∈[-2,7] ;; name in the prediction
= x \in [-2,7] ;; -2 \le x \le 7 ;; inequality
= (1,5] ;; 5 \ge x > 1 ;; falling inequality
= (3,\infty) ;; x > 3 ;; one-sided
= (-\infty,3] ;; x \leq 3 ;; one-sided, closed
= (-\infty,3] ;; 3 \ge x ;; turned round
= k \geqslant 2 ;; k \ge 2 ;; spelling of the sign
= k \ge 2 ;; k >= 2 ;; plain text
! (1,2] ;; [1,2] ;; open and closed
! (1,2] ;; (1,2) ;; the other end
! (-\infty, 0] ;; (-\infty, 0) ;; bracket
! (2,\infty) ;; (2,-\infty) ;; sign
! k \ge 2 ;; k > 2 ;; strict
= (1,2) ;; ]1,2[ ;; French brackets
= [1,2) ;; [1,2[ ;; half of them
= (1,2)\cup(3,4) ;; ]1,2[ \cup ]3,4[ ;; in a union
= (-1,1) ;; -1<x<1 ;; two-sided
! (1,2) ;; ]1,2] ;; the other end
! x > 3 ;; x < 3 ;; direction
! 3 ;; x > 3 ;; a bound is not the set
! [1,2] ;; 1,2 ;; a list is not an interval

# tuples
= (-2,1) ;; \left( -2, 1 \right) ;; spaces
= (2,3) ;; 2,3 ;; a tuple may lose its brackets
= (1,2) ;; \langle 1,2 \rangle ;; angle brackets
= (1,2) ;; (x,y)=(1,2) ;; names in front
= ( 3, \frac{\pi}{2} ) ;; (3, \pi/2) ;; entries by value
= (45^{\circ}, 60^{\circ}) ;; (45,60) ;; degrees inside
= (5) ;; 5 ;; one entry in brackets is that entry
! (-2,1) ;; (1,-2) ;; order
! (2,3) ;; 3,2 ;; order without brackets
! (1,2) ;; (1,2,3) ;; length
! (1,2) ;; \{1,2\} ;; a set is not a tuple
! \{1,2\} ;; (1,2) ;; nor the other way round
! (1,8,19), (2,7,13) ;; (8,1,19),(2,7,13) ;; order inside
= (1,8,19), (2,7,13) ;; (2,7,13),(1,8,19) ;; no order outside
= (6,31,-1) ;; (6, 31, -1) ;; MATH-500

# lists, sets and unions
= 1,-2 ;; -2,1 ;; no order
= 1,-2 ;; -2 \text{ and } 1 ;; and
= 1,-2 ;; 1 or -2 ;; or
= 1,-2 ;; 1; -2 ;; semicolon
= 1,-2 ;; x=1, x=-2 ;; names
= 2,3 ;; x_1=2, x_2=3 ;; names with subscripts
= (\pm 1, 0) ;; (1,0),(-1,0) ;; two tuples
= 1,-2 ;; x = 1 \text{ or } x = -2 ;; names and or
= 3, 5, 7 ;; 3, 5, \text{ and } 7 ;; comma and and
= 2400, 1350, 864 ;; 864,1350,2400 ;; one entry looks like thousands
= $-1$,$2$,$-2$ ;; -2,-1,2 ;; dollars between, as in OlympiadBench
= a=2, a=-6-4\sqrt2 ;; -6-4\sqrt{2}, 2 ;; names in the gold
= f(x)=x,f(x)=-x ;; f(x)=-x, f(x)=x ;; functions
= \{1,2\} ;; \{2,1\} ;; a set
= \{1,2\} ;; 2,1 ;; a set without braces
= \{1,2\} ;; \lbrace 1, 2 \rbrace ;; named braces
= \{1,2\} ;; {1,2} ;; braces of plain text
= \pm 3 ;; 3,-3 ;; both roots
= x = \pm 3 ;; 3, -3 ;; both roots, name
= 1 \pm \sqrt{19} ;; 1-\sqrt{19}, 1+\sqrt{19} ;; MATH-500
= \{1\pm\sqrt{5},-2\} ;; -2, 1+\sqrt5, 1-\sqrt5 ;; inside a set
= \emptyset ;; \{\} ;; empty set
= \emptyset ;; \varnothing ;; another sign
= (0,9) \cup (9,36) ;; (9,36)\cup(0,9) ;; order of a union
= (-\infty,2)\cup(3,\infty) ;; x<2 \text{ or } x>3 ;; inequalities
= (-\infty, 0) \cup\{1\} ;; \{1\} \cup (-\infty,0) ;; interval and set
! 1,-2 ;; 1 ;; one is missing
! 1 ;; 1,-2 ;; one is too many
! 1,-2 ;; 1,2 ;; sign
! \{1,2\} ;; \{1,2,3\} ;; one more
! -2,-2 ;; -2 ;; a multiset
! 16,3,1,1 ;; 16,3,1 ;; a multiset
! 1,2,2 ;; 1,1,2 ;; counts
! \pm 3 ;; 3 ;; one root
! 3 ;; \pm 3 ;; two roots
! (0,9) \cup (9,36) ;; (0,36) ;; the hole
! \emptyset ;; 0 ;; the empty set is not zero
! \emptyset ;; \{0\} ;; nor is it the set of zero

# matrices
= \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; \begin{bmatrix}1&2\\3&4\end{bmatrix} ;; kind of bracket
= \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; \left(\begin{array}{cc}1&2\\3&4\\\end{array}\right) ;; array
= \begin{pmatrix} -1/3 \\ 2 \end{pmatrix} ;; \begin{pmatrix} -\frac13 \\ 2 \end{pmatrix} ;; entries by value
= \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; (1,2) ;; a vector as a tuple
! \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix} ;; transposed
! \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; \begin{vmatrix}1&2\\3&4\end{vmatrix} ;; a determinant
! \begin{pmatrix} 1 & 2 \end{pmatrix} ;; \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; row and column
! \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; 1,2,3,4 ;; the shape
! \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; \begin{pmatrix} 1 \\ -2 \end{pmatrix} ;; sign

# text and choices
= Yes ;; \text{Yes} ;; wrapper
= Yes ;; yes. ;; case and full stop
= Yes ;; **Yes** ;; Markdown
= No ;; \mathrm{no} ;; another wrapper
# a plain gold asks for a plain answer
! 23 ;; 14 + 6 + 3 ;; a sum copied from the problem
! \frac{5}{4} ;; 1/4 + 1/4 + 3/4 ;; a sum of fractions
! \frac{5}{4} ;; \frac{1}{4}+\frac{1}{4}+\frac{3}{4} ;; the same in LaTeX
! 35 ;; 5 \times 7 ;; product
! 12 ;; 3(4) ;; product of neighbours
! 120 ;; 5! ;; factorial
! 10 ;; \binom{5}{2} ;; binomial
! 4 ;; \sqrt{16} ;; root
! 2 ;; 8^{1/3} ;; root as a power
! 0.5 ;; \sin(30^\circ) ;; function
! 1 ;; e^0 ;; constant
! 5 ;; \lfloor 5.5 \rfloor ;; floor
! \frac12 ;; \frac{2+3}{10} ;; fraction of sums
! 5\text{ cm} ;; 2+3\text{ cm} ;; with a unit
! 50\% ;; 25\%+25\% ;; percentages
! x=5 ;; x=2+3 ;; right side of an equation
! x=5 ;; 2+3 ;; the gold names its variable
! [0,5] ;; [0,2+3] ;; end of an interval
! (2,3) ;; (1+1,3) ;; item of a tuple
! \{2,3\} ;; \{1+1,3\} ;; item of a set
! 2, 3 ;; 1+1, 3 ;; item of a list
= 23 ;; 14 + 6 + 3 = 23 ;; the result follows
= 5 ;; \frac{10}{2} ;; a fraction need not be reduced
= 5 ;; 10/2 ;; the same
= 1000 ;; 10^3 ;; one power
= 4 ;; (-2)^2 ;; one power with a sign
= 2000 ;; 2\times10^3 ;; scientific notation
= -3.5 ;; -3\frac12 ;; mixed number
= 2^{10} ;; 1024 ;; the gold is a power
= 2^{10} ;; 2\cdot 512 ;; and not plain
= \binom{5}{2} ;; 5\cdot 2 ;; the gold is not plain
# repeating decimals
= \frac13 ;; 0.\overline{3} ;; a third
= \frac16 ;; 0.1\overline{6} ;; a sixth
= \frac53 ;; 1.\overline{6} ;; with a whole part
= -\frac13 ;; -0.\overline{3} ;; sign
= 0.\overline{3} ;; \frac13 ;; as the gold
= \frac{41}{333} ;; 0.\overline{123} ;; period of three
! 0.3 ;; 0.\overline{3} ;; not the digits alone
= \text{Monday} ;; \textbf{monday} ;; bold
= \text{Evelyn} ;; \text{ Evelyn } ;; spaces
= \text{no solution} ;; No solution ;; two words
= C ;; (C) ;; choice
= C ;; C. ;; choice and full stop
= C ;; C) ;; half a bracket
= C ;; c ;; a choice, whatever its case
= B ;; \textbf{(B)}\ 5 ;; a choice with its value
= B ;; (B) \frac12 ;; the same
! B ;; (C) 5 ;; another choice with its value
! B ;; (B) 5 or (C) 7 ;; two choices
! B ;; (B) or (C) ;; two choices without values
! 5 ;; (B) 5 ;; the gold is a value
! m ;; M ;; a variable keeps its case
= xy ;; yx ;; a product of two variables
= \binom{5}{2} ;; {5\choose 2} ;; TeX's choose
= C ;; \mathbf{C} ;; bold
= C ;; \text{(C)} ;; text
= all real numbers ;; All real numbers ;; case of a word within a text
= \text{(C)} ;; \textbf{(C)} ;; two wrappers
= \text{(B)} ;; B ;; MATH-500
! C ;; D ;; another choice
! C ;; ABCD ;; all choices
! C ;; CD ;; two choices
! C ;; A, C ;; two choices in a list
! C ;; C and D ;; and
! Yes ;; No ;; contrary
! Yes ;; Yes and No ;; hedge
! Yes ;; Yes or No ;; hedge
! No ;; No solution ;; longer
! No ;; None ;; a substring
! \text{even} ;; uneven ;; a substring
! \text{even} ;; not even ;; contrary
! east ;; seat ;; letters are no factors
! \text{Monday} ;; Mon ;; a substring
! Yes ;; 1 ;; another kind

# wrappers and characters
= 5 ;; $5$ ;; dollars
= 5 ;; $$5$$ ;; display
= 5 ;; \(5\) ;; inline
= 5 ;; \[5\] ;; display
= 5 ;; {5} ;; braces
= 5 ;; \boxed{5} ;; a box
= 5 ;; \displaystyle 5 ;; style
= 5 ;; ~5\;\quad ;; spaces
= 5 ;; \mathbf{5} ;; bold
= 5 ;; `5` ;; Markdown
= 5 ;; \text{5} ;; text
= -5 ;; −5 ;; minus sign
= -5 ;; –5 ;; en dash
= 12 ;; １２ ;; full-width digits
! 2 ;; 1 + 1 ;; a sum is work left undone
! 3 ;; 3 or 4 ;; hedge
! 3 ;; 3, maybe 4 ;; hedge
! 5 ;; ... ;; placeholder
! 5 ;; \ldots ;; placeholder
! 5 ;; ? ;; no answer
! 1 ;; 10^{10^{10}} ;; a tower
! 1 ;; 2^{100000000} ;; a giant
! 1 ;; 2^{-100000000} ;; a dwarf
! 1 ;; 1e999999999 ;; a giant exponent
! 1 ;; 100000000! ;; a giant factorial
= 10^{10^{10}} ;; 10^{10^{10}} ;; the same tower, never computed
"""


def table():
    rule, cases = None, []
    for line in TABLE.strip().splitlines():
        if line.startswith("# "):
            rule = line[2:]
        elif line:
            gold, prediction, why = line[2:].split(" ;; ")
            name = f"{rule}: {why}: {gold} / {prediction}"
            cases.append(pytest.param(gold, prediction, line[0] == "=", id=name))
    return cases


@pytest.mark.parametrize("gold, prediction, expected", table())
def test_table(gold, prediction, expected):
    """A wrong answer is rewarded (expected False) or a right one is not (True); the id names the rule."""
    assert answers_equal(prediction, gold) is expected


def test_table_is_large():
    """A part of the table is lost, and with it the rules that it guards."""
    assert len(table()) >= 250


EXTRACT = [
    # sections and labels
    (["7", "9"], "### Problem 1\nAnswer 1: \\boxed{7}\n### Problem 2\nAnswer 2: \\boxed{9}", "TT",
     "the format asked for"),
    (["7", "9"], "### Problem 2\nAnswer 2: \\boxed{9}\n### Problem 1\nAnswer 1: \\boxed{7}", "TT",
     "out of order"),
    (["7", "9"], "### Problem 1\r\nAnswer 1: \\boxed{7}\r\n\r\n### Problem 2\r\nAnswer 2: \\boxed{9}\r\n",
     "TT", "CRLF"),
    (["7", "9"], "### Problem 1\n**Answer 1:** \\boxed{7}\n### Problem 2\n**Answer 2**: $\\boxed{9}$", "TT",
     "bold labels"),
    (["7"], "## Problem 1\nanswer 1: \\boxed{7}", "T", "two hashes, small letter"),
    (["7"], "### PROBLEM 1\nANSWER 1: \\boxed{7}", "T", "capitals"),
    (["7", "9"], "**Problem 1**\n\\boxed{7}\n**Problem 2**\n\\boxed{9}", "TT", "bold headers"),
    (["7", "9"], "#### Problem 1: easy\n\\boxed{7}\n#### Problem 2: hard\n\\boxed{9}", "TT",
     "titles after the number"),
    (["7", "9"], " ### Problem 1\nAnswer 1: \\boxed{7}\n  ### Problem 2\n\\boxed{9}", "TT",
     "indented headers"),
    (["7", "9"], "Answer 1: \\boxed{7}\nAnswer 2: \\boxed{9}", "TT", "labels without headers"),
    (["7", "9"], "### Problem 1\nx\n### Problem 2\ny\n\nAnswer 1: \\boxed{7}\nAnswer 2: \\boxed{9}", "TT",
     "all at the end"),
    (["7", "9"], "### Problem 1\nx\n### Problem 2\ny\nAnswer 1:\n\\boxed{7}\nAnswer 2:\n$$\\boxed{9}$$", "TT",
     "a line below"),
    (["7", "9"], "### Problem 1\nsee ### Problem 2 below\n\\boxed{7}\n### Problem 2\n\\boxed{9}", "TT",
     "header in mid-line"),
    (["7", "9"], "### Problem 1\nwork\n### Problem 2\nAnswer 2: \\boxed{7}", "FF",
     "right value, wrong label"),
    (["5", "6"], "### Problem 1\nwork\n### Problem 2\nProblem 1 gives \\boxed{5}. Answer 2: \\boxed{6}", "FT",
     "a box without label serves its section only"),
    (["5", "6"], "### Problem 1\nAnswer 1: unknown\nfirst try \\boxed{9}, then \\boxed{5}\n### Problem 2\n",
     "TF", "a label whose line has no box does not catch a far one, the section does"),
    (["5", "6"], "### Problem 2\nAnswer 1: not found.\nThe second gives \\boxed{6}", "FT",
     "as before, in another section"),
    (["5"] * 3, "Answer 1-3: \\boxed{5}", "FFF", "one box for several"),
    (["5"] * 3, "Answers 1 to 3: \\boxed{5}", "FFF", "one box for several, in words"),
    (["5"] * 2, "### Problem 1 and 2\n\\boxed{5}", "FF", "one section for several"),
    ([str(k) for k in range(1, 13)],
     "".join(f"### Problem {k}\nAnswer {k}: \\boxed{{{k}}}\n" for k in range(12, 0, -1)), "T" * 12,
     "Problem 1 is not Problem 10"),
    # which box counts
    (["3"], "### Problem 1\nAnswer 1: \\boxed{3} or \\boxed{4}", "F", "two on a line: the last"),
    (["4"], "### Problem 1\nAnswer 1: \\boxed{3} or \\boxed{4}", "T", "two on a line: the last"),
    (["6"], "### Problem 1\nAnswer 1: \\boxed{5}\n### Problem 1\nAnswer 1: \\boxed{6}", "T",
     "a repeated section"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{5}\n### Problem 1\nAnswer 1: \\boxed{6}", "F",
     "a repeated section"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{5}\nThe steps were \\boxed{2} and \\boxed{3}.", "T",
     "the labelled one wins"),
    (["5"], "### Problem 1\nfirst \\boxed{2}, then \\boxed{5}", "T", "no label: the last of the section"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{x=5}. The final answer is 5.", "T", "text after the box"),
    (["5", "6"], "\\boxed{5}\n\\boxed{6}", "FF", "two problems and no header"),
    (["6"], "so \\boxed{5}, no, \\boxed{6}", "T", "one problem and no header: the last box"),
    (["6"], "Answer 2: \\boxed{6}", "F", "one problem: another index is none"),
    (["6"], "### Problem 2\n\\boxed{6}", "F", "one problem: another section is none"),
    (["5"], "\\boxed{5}\n### Problem 1\nno idea", "F", "before the first header"),
    (["5", "6"], "### Problem 3\nAnswer 3: \\boxed{5}\n### Problem 0\nAnswer 0: \\boxed{6}", "FF",
     "outside of 1..N"),
    (["5", "6"], "### Problem 1\nAnswer 3: \\boxed{5}", "FF", "outside of 1..N, within a section"),
    (["5"], "### Problem 99999999999999999999\nAnswer 99999999999999999999: \\boxed{5}", "F",
     "a giant index"),
    # boxes
    (["5"], "### Problem 1\nAnswer 1: $\\boxed 5$", "T", "no braces"),
    (["12"], "### Problem 1\nAnswer 1: \\boxed 12.", "T", "no braces, full stop"),
    (["1/2"], "### Problem 1\nAnswer 1: $\\boxed\\frac{1}{2}$", "T", "no braces, a command"),
    (["5"], "### Problem 1\nAnswer 1: \\fbox{5}", "T", "fbox"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed {5}", "T", "a space before the brace"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{\\boxed{5}}", "T", "nested"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{ 5\n}", "T", "a line break inside"),
    (["\\{1,2\\}"], "### Problem 1\nAnswer 1: \\boxed{\\{1,2\\}}", "T", "escaped braces"),
    (["\\frac{1}{\\sqrt{2}}"], "### Problem 1\nAnswer 1: \\boxed{\\frac{1}{\\sqrt{2}}}", "T",
     "three levels of braces"),
    (["5", "6"], "### Problem 1\nAnswer 1: \\boxed{5\n### Problem 2\nAnswer 2: \\boxed{6}", "FT",
     "unclosed, then closed"),
    # what earns nothing
    (["7", "1/2"], "### Problem 1\nAnswer 1: \\boxed{7}\n### Problem 2\nAnswer 2: \\boxed{\\frac{1}{2}", "TF",
     "cut by the budget"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed", "F", "cut before the brace"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{", "F", "cut after the brace"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{}", "F", "empty"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{...}", "F", "placeholder"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{5}\nI had to end with Answer 1: \\boxed{...}.", "T",
     "a placeholder hides nothing"),
    (["5"], "### Problem i\nAnswer i: \\boxed{5}", "F", "the prompt's own letter as the index"),
    (["5"], "### Problem 1\nAnswer 1: \\boxed{i}", "F", "the prompt's own letter in the box"),
    (["5"], "### Problem 1\nAnswer 1: 5", "F", "no box"),
    (["5"], "", "F", "nothing"),
    ([""], "### Problem 1\nAnswer 1: \\boxed{}", "F", "an empty gold is never rewarded"),
    # thinking
    (["5"], "<think>### Problem 1\nAnswer 1: \\boxed{5}</think>\n### Problem 1\nAnswer 1: \\boxed{6}", "F",
     "the reply wins"),
    (["6"], "<think>### Problem 1\nAnswer 1: \\boxed{5}</think>\n### Problem 1\nAnswer 1: \\boxed{6}", "T",
     "the reply wins"),
    (["6"], "<think>### Problem 1\nAnswer 1: \\boxed{5}</think>\nSo it is \\boxed{6}", "T",
     "the reply wins without a label"),
    (["5", "6"], "<think>Answer 1: \\boxed{5}\nAnswer 2: \\boxed{7}</think>\nAnswer 2: \\boxed{6}", "TT",
     "one by one"),
    (["5"], "<think>### Problem 1\nAnswer 1: \\boxed{5}</think>\n", "T", "nothing follows"),
    (["5"], "<think>### Problem 1\nAnswer 1: \\boxed{5}", "T", "the thinking was cut"),
    (["6"], "<think>Answer 1: \\boxed{5}</think>\n### Problem 1\nSo \\boxed{6}" + " words\n" * 400, "T",
     "no label in a long reply"),
    (["6", "7"], "### Problem 1\nSo \\boxed{6}\n### Problem 2\nSo \\boxed{7}" + " words\n" * 400, "TT",
     "no labels in a long text"),
]


@pytest.mark.parametrize(
    "golds, completion, expected", [pytest.param(*case[:3], id=case[3]) for case in EXTRACT])
def test_extraction(golds, completion, expected):
    """A box counts for another problem, or for none."""
    assert score(completion, golds) == [letter == "T" for letter in expected]


def test_extract_answers_returns_the_text_of_the_box():
    """Solving writes the wrong text as an answer, or an unanswered problem is not asked again."""
    completion = "### Problem 1\nAnswer 1: \\boxed{ \\frac{1}{2} }\n### Problem 3\nAnswer 3: \\boxed{x"
    assert extract_answers(completion, 3) == ["\\frac{1}{2}", None, None]


def test_an_answer_before_the_cut_keeps_its_credit():
    """The budget has the wrong effect: answers before the cut earn nothing, or problems after it earn
    something."""
    golds = ["22", "1/2", "x+1", "7"]
    completion = "".join(f"### Problem {i}\nwork\nAnswer {i}: \\boxed{{{gold}}}\n\n"
                         for i, gold in enumerate(golds, 1))
    ends = [completion.index("}\n\n", completion.index(f"Answer {i}")) + 1 for i in (1, 2, 3, 4)]
    for cut in range(len(completion) + 1):
        assert score(completion[:cut], golds) == [end <= cut for end in ends], completion[:cut]


def quickest(function, *arguments):
    """Processor seconds of the quickest of three calls. A garbage collection of everything that pytest holds
    takes a quarter of a second, and falls into one of them at most."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function(*arguments)
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.skipif(not EXAMPLES.exists(), reason="the shared examples are not here")
def test_shared_examples():
    """A case of the shared list has another verdict than agreed on, or takes too long."""
    wrong = []
    for line in EXAMPLES.read_text().splitlines():
        case = json.loads(line)
        judge = answers_equal if case["kind"] == "compare" else score
        assert quickest(judge, case["pred"], case["gold"]) < case.get("max_ms", 1000) / 1000
        result = judge(case["pred"], case["gold"])
        if result != case["expected"]:
            wrong.append((case["gold"], case["pred"]))
    assert wrong == []


def golds():
    return [json.loads(line)["answer"] for path in sorted(BENCHMARKS.glob("*.jsonl")) for line in path.open()]


needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the shared benchmarks are not here")


@needs_benchmarks
def test_every_gold_equals_itself():
    """A gold does not equal itself, so its problem can never be answered correctly."""
    assert [gold for gold in golds() if not answers_equal(f" ${gold}$ ", gold)] == []


@needs_benchmarks
def test_rewrites_that_keep_the_value_are_accepted():
    """A right answer in another spelling earns nothing."""
    pairs = [(gold, text) for gold in sorted(set(golds())) for text in keeping(gold).values()]
    missed = [pair for pair in pairs if not answers_equal(pair[1], pair[0])]
    assert len(missed) <= 0.01 * len(pairs), missed


@needs_benchmarks
def test_rewrites_that_change_the_value_are_refused():
    """A wrong answer earns a reward."""
    pairs = [(gold, text) for gold in sorted(set(golds())) for text in changing(gold).values()]
    paid = [pair for pair in pairs if answers_equal(pair[1], pair[0])]
    assert len(paid) <= 0.001 * len(pairs), paid


# Properties ------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-10**30, 10**30).map(str),
    st.fractions(max_denominator=10**6).map(lambda f: f"\\frac{{{f.numerator}}}{{{f.denominator}}}"),
    st.fractions(max_denominator=10**6).map(str),
    st.integers(-10**15, 10**15).map(lambda n: f"{n / 10**6:f}"),
    st.integers(1, 10**6).map("{:,}".format),
    st.integers(-40, 40).map("7.5e{}".format),
    st.integers(2, 99).map("\\sqrt{{{}}}".format),
    st.integers(1, 99).map("{}\\%".format),
)
PIECES = [
    "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "^", "_", "!", "+", "-", "*", "/", "=",
    "<", ",", "|", "\\le", "\\in", "\\cup", "\\pm", "\\pi", "\\infty", "\\log", "\\sin", "\\text{",
    "\\begin{pmatrix}", "&", "\\\\", "\\end{pmatrix}", "\\lfloor", "\\rfloor", "\\binom", "%", "\\%",
    "^\\circ", "e", "i", "x", "n", "0", "1", "2", "9", "12", "1,234", ".", "1e9", "9999999999", " ", "or",
    "and", "cm", "$", "\\boxed{", "Answer 1:", "### Problem 1\n", "\n", "</think>", "²", "½", "√", "٣",
    "\u200b", "\ud800", "\x00", "…",
]
soup = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=500, deadline=None)
@given(numbers, numbers)
@example("50\\%", "0.5")
@example("1,234", "1234")
def test_equality_of_numbers_is_symmetric(a, b):
    """The verdict on two numbers depends on which of them is the gold."""
    assert answers_equal(a, b) == answers_equal(b, a)


@settings(max_examples=300, deadline=None)
@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_fractions_are_equal_exactly_when_they_are(a, b):
    """The parser's arithmetic differs from that of Fraction."""
    latex = [f"\\frac{{{f.numerator}}}{{{f.denominator}}}" for f in (a, b)]
    assert answers_equal(latex[0], latex[1]) == (a == b)
    assert answers_equal(f"x+{latex[0]}+{latex[1]}", f"x+{a + b}")  # x, so that the gold is not plain
    assert answers_equal(f"x+({a})*({b})", f"x+{a * b}")
    assert answers_equal(f"x+({a})-{latex[1]}", f"x+{a - b}")


@settings(max_examples=500, deadline=None)
@given(st.one_of(soup, st.text()))
def test_everything_equals_itself(text):
    """A gold that is not understood does not equal itself. Only text without content (spaces, dots, empty
    brackets of LaTeX) equals nothing."""
    assert answers_equal(f" {text}", text) or not answers_equal(text, text)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(soup, st.text()), st.one_of(soup, st.text()))
def test_no_exception_and_no_delay(completion, gold):
    """A completion makes the checker raise or hang, and the run ends."""
    boxed = f"### Problem 1\nAnswer 1: \\boxed{{{completion}}}"
    assert answers_equal(completion, gold) in (True, False)
    assert score(boxed, [gold, gold]) in ([True, False], [False, False])
    assert len(extract_answers(completion, 4)) == 4
    assert quickest(score, boxed, [gold, gold]) < 0.25


@pytest.mark.parametrize("value", [None, 5, 5.0, True, b"5", ["5"], {"5": 5}, object()])
def test_other_types_are_wrong_not_fatal(value):
    """An answer that was not found (None), or a value of another type, makes the checker raise."""
    assert answers_equal(value, "5") is False and answers_equal("5", value) is False
    assert score(value, ["5"]) == [False]
    assert extract_answers(value, 2) == [None, None]


def test_empty_gold_is_never_rewarded():
    """An empty gold of a broken data set rewards an empty answer."""
    for gold in ("", " ", "{}", "{ }", "$$", "\\text{}", "...", "\\,", "\u200b"):
        for prediction in ("", " ", gold, "5", "...", "$", "\\boxed{}"):
            assert not answers_equal(prediction, gold)


HOSTILE = [
    "(" * 100_000 + ")" * 100_000, "{" * 200_000, "\\sqrt" * 40_000, "\\frac" * 90, "\\sin" * 90 + "x",
    "-" * 499 + "1", "2^" * 249 + "2", "9^{9^{9^{9}}}", "3" + "!" * 400, "((500)!)!",
    "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, "+".join(["2^{-4000}", "3^{-2500}"] * 27), "x" * MAX_LENGTH,
    "(x+1)" * 99, "xyz+" * 124 + "1", ",".join(["x^2+y"] * 64), "\\pm " * 90 + "1", "\\text{a}" * 60 + "1",
    " " * 498 + "1", "1" * 5000, "1" * MAX_LENGTH, "1," * 249, "100," * 124 + "100",
    "\\begin{pmatrix}" + "1&" * 60 + "\\end{pmatrix}", "(1," * 30 + "2" + ")" * 30, "x=" * 249 + "1",
    "x\\in " * 90, "x<" * 60, "\\lfloor" * 90, "|" * MAX_LENGTH, "x_{" * 160, "123 " * 124 + "5",
    "\ufdfa" * MAX_LENGTH, "²" * MAX_LENGTH, "½" * MAX_LENGTH, "1e999999999", "1e-999999999",
    "\\binom{500}{250}" * 30, "(x!)" * 120, "\ud800" * MAX_LENGTH, "\x00" * MAX_LENGTH, "A" * MAX_LENGTH,
    "word " * 99, "1\\frac12" * 60, "\\log_" * 90, "*".join(["1e1000", "3e-1000"] * 40),
]


@pytest.mark.parametrize("text", HOSTILE, ids=[repr(text[:24]) for text in HOSTILE])
def test_hostile_answers_take_milliseconds(text):
    """An answer with deep recursion or giant numbers takes so long that the run stops."""
    for gold in ("5", text[::-1], "x+" + text):
        assert quickest(answers_equal, text, gold) < 0.25  # measured: about 0.01 s


SLOW = [
    ",".join(f"x+{k}" for k in range(64)), ",".join(f"{k}" for k in range(120)), ",".join(["x^2+y"] * 64),
    ",".join(f"(x+{k})^2" for k in range(50)), "\\lfloor x\\rfloor," + ",".join(f"x+{k}" for k in range(60)),
    "x\\pm 1," * 60, "\\{x\\pm" * 40, "(x+1)" * 95, "2^{999}+" * 60 + "1", "(2^{999}/3^{600})" * 28,
    "\\sin^2 x+" * 50 + "1", "x!+" * 160 + "1",
]


@pytest.mark.parametrize("text", SLOW, ids=[repr(text[:24]) for text in SLOW])
def test_long_answers_take_milliseconds(text):
    """Comparing long lists item by item, or expressions at several points, takes too long."""
    for gold in (text[::-1], ",".join(reversed(text.split(","))), "x+" + text):
        # measured: below 0.01 s, on a machine that does nothing else
        assert quickest(answers_equal, text[:MAX_LENGTH], gold[:MAX_LENGTH]) < 0.03


FLOODS = [
    "\\boxed{", "\\boxed{}", "\\boxed{5}", "\\boxed", "{", "}", "\\", "### Problem 1\n", "### ",
    "# Problem1\n", "#", "*", "Answer 1: ", "answer1:", "Answer 1:\n", "answer1:\\boxed{5}", "\n", " ", "a",
    "n", "box", "</think>", "answer ", "Answer 1: \\boxed{" + "{" * 400, "\\boxed{" + "{}" * 240, "\r\n",
    "\\boxed ", "answer1:" + "$" * 90 + "\n\\boxed",
]


@pytest.mark.parametrize("flood", FLOODS, ids=[repr(flood[:24]) for flood in FLOODS])
def test_extraction_is_linear(flood):
    """Extraction from 400,000 characters takes quadratic time in what they repeat."""
    text = (flood * (400_000 // len(flood)))[:399_000]
    for completion in (text, text + "\nAnswer 1: \\boxed{5}", "Answer 1: \\boxed{" + text):
        assert quickest(extract_answers, completion, 8) < 0.25  # measured: below 0.01 s


# Fuzz ------------------------------------------------------------------------------------------------------

def mutated(rng, bases):
    """A completion for two problems with a few random edits."""
    text = "".join(f"### Problem {i}\n{rng.choice(bases)}\nAnswer {i}: \\boxed{{{rng.choice(bases)}}}\n"
                   for i in (1, 2))
    for _ in range(rng.randrange(1, 6)):
        a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        edit = rng.randrange(6)
        if edit == 0:
            text = text[:a] + rng.choice(PIECES) + text[a:]
        elif edit == 1:
            text = text[:a] + text[a + rng.randrange(1, 5):]
        elif edit == 2:
            text = text[:a] + chr(rng.randrange(rng.choice((128, 0x3000, 0x110000)))) + text[a + 1:]
        elif edit == 3:
            text = text[:a] + text[a:b] * rng.randrange(2, 5) + text[b:]
        elif edit == 4:
            text = text[:a] + rng.choice(PIECES) * rng.randrange(2, 40) + text[a:]
        else:
            text = text[:b]
        text = text[:4000]
    return text


def fuzz(count, seed=0):
    """(number of calls that raised, processor seconds of the slowest call, its completion, its golds)."""
    rng = random.Random(seed)
    bases = [text for line in TABLE.splitlines() if " ;; " in line for text in line[2:].split(" ;; ")[:2]]
    bases += sorted(set(golds())) if BENCHMARKS.exists() else []
    raised, slowest = 0, (0, "", [])
    for _ in range(count):
        completion, pair = mutated(rng, bases), [rng.choice(bases), rng.choice(bases)]
        start = time.process_time()
        try:
            verdict = score(completion, pair)
            assert len(verdict) == 2 and set(verdict) <= {True, False}
        except Exception as error:
            raised += 1
            print(repr(error), repr(completion), pair)
        if time.process_time() - start > slowest[0]:
            slowest = max(slowest, (quickest(score, completion, pair), completion, pair))
    return raised, *slowest


def test_fuzz():
    """Text that a model can write makes the checker raise or hang. (At full size: --fuzz 1000000.)"""
    raised, seconds, completion, pair = fuzz(5000)
    assert raised == 0
    assert seconds < 0.25, (completion, pair)


if __name__ == "__main__":
    count = int(sys.argv[sys.argv.index("--fuzz") + 1]) if "--fuzz" in sys.argv else 1000
    start = time.process_time()
    raised, seconds, completion, pair = fuzz(count)
    print(f"{count} completions in {time.process_time() - start:.0f} s of processor time")
    print(f"{raised} exceptions, slowest call {seconds * 1000:.1f} ms")
    print("slowest:", repr(completion), pair)
