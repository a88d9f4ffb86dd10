//! Debian changelogs as text: entries, and every line that is in none.
//!
//! The format is that of deb-changelog(5). Real files are decades old: what does not fit is counted with its reason, never
//! guessed at, and never stops the rest.

use chrono::DateTime;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Source package.
    pub package: String,
    /// Version, as written.
    pub version: String,
    /// Distributions, separated by one space.
    pub distributions: String,
    /// The value of `urgency`, as written.
    pub urgency: Option<String>,
    /// Microseconds since 1970; none if the date cannot be read.
    pub changed_at: Option<i64>,
    /// `Name <mail@host>`, as written.
    pub maintainer: String,
    /// The changes, without the blank lines around them.
    pub body: String,
}

/// Why a line is in no entry, or an entry is incomplete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Oddity {
    /// `# Older entries have been removed …` and its like.
    Remark,
    /// Text before, between or after entries; older formats among it.
    OutsideEntries,
    /// An entry that ends without ` -- Name <mail>  date`.
    NoTrailer,
    /// A trailer that does not name somebody.
    Nobody,
    /// A trailer outside of an entry.
    LoneTrailer,
    /// A date that cannot be read; the entry is taken with `changed_at` NULL.
    Date,
}

impl Oddity {
    /// For the report.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Remark => "remarks between entries (`# …`), skipped",
            Self::OutsideEntries => "lines that belong to no entry (older formats, editor settings), skipped",
            Self::NoTrailer => "entries without ` -- Name <mail>  date`, skipped",
            Self::Nobody => "entries whose last line names no `Name <mail>`, skipped",
            Self::LoneTrailer => "lines ` -- …` without an entry before them, skipped",
            Self::Date => "entries with an unreadable date, loaded with changed_at NULL",
        }
    }
}

/// What a file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Its entries, in their order.
    pub entries: Vec<Entry>,
    /// What is odd: line number (from 1) and why.
    pub odd: Vec<(usize, Oddity)>,
}

/// An entry whose trailer has not been seen.
struct Open<'a> {
    line: usize,
    heading: Heading<'a>,
    body: Vec<&'a str>,
}

#[derive(Debug, PartialEq, Eq)]
struct Heading<'a> {
    package: &'a str,
    version: &'a str,
    distributions: String,
    urgency: Option<&'a str>,
}

/// Reads a whole changelog.
pub fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    let mut open: Option<Open<'_>> = None;
    for (line, text) in (1..).zip(text.lines()) {
        if let Some(heading) = heading(text) {
            if let Some(unfinished) = open.replace(Open { line, heading, body: Vec::new() }) {
                parsed.odd.push((unfinished.line, Oddity::NoTrailer));
            }
        } else if let Some(signed) = text.strip_prefix(" --") {
            match open.take() {
                Some(entry) => close(&mut parsed, entry, line, signed),
                None => parsed.odd.push((line, Oddity::LoneTrailer)),
            }
        } else if let Some(entry) = &mut open {
            entry.body.push(text);
        } else if text.starts_with('#') {
            parsed.odd.push((line, Oddity::Remark));
        } else if !text.trim().is_empty() {
            parsed.odd.push((line, Oddity::OutsideEntries));
        }
    }
    if let Some(unfinished) = open {
        parsed.odd.push((unfinished.line, Oddity::NoTrailer));
    }
    parsed
}

fn close(parsed: &mut Parsed, open: Open<'_>, line: usize, signed: &str) {
    let Some((maintainer, date)) = trailer(signed) else {
        parsed.odd.push((line, Oddity::Nobody));
        return;
    };
    let changed_at = date_us(date);
    if changed_at.is_none() {
        parsed.odd.push((line, Oddity::Date));
    }
    let Heading { package, version, distributions, urgency } = open.heading;
    parsed.entries.push(Entry {
        package: package.to_owned(),
        version: version.to_owned(),
        distributions,
        urgency: urgency.map(str::to_owned),
        changed_at,
        maintainer: maintainer.to_owned(),
        body: without_blank_ends(&open.body).join("\n"),
    });
}

/// `package (version) distribution…; key=value, …`
fn heading(line: &str) -> Option<Heading<'_>> {
    let (package, rest) = line.split_once(' ')?;
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.');
    if !package.starts_with(|c: char| c.is_ascii_alphanumeric()) || !package.chars().all(named) {
        return None;
    }
    let (version, rest) = rest.trim_start().strip_prefix('(')?.split_once(')')?;
    if version.is_empty() || version.contains(|c: char| c.is_whitespace() || c == '(') {
        return None;
    }
    let (distributions, metadata) = rest.split_once(';')?;
    let distributions: Vec<&str> = distributions.split_whitespace().collect();
    if distributions.is_empty() || !distributions.iter().all(|name| name.chars().all(named)) {
        return None;
    }
    let mut pairs = metadata.split(',').filter_map(|pair| pair.split_once('='));
    let urgency = pairs.find(|(key, _)| key.trim().eq_ignore_ascii_case("urgency")).map(|(_, value)| value.trim());
    Some(Heading { package, version, distributions: distributions.join(" "), urgency })
}

/// `Name <mail@host>` and the date after it.
fn trailer(signed: &str) -> Option<(&str, &str)> {
    let end = signed.rfind('>')? + 1;
    let (maintainer, date) = (signed[..end].trim(), signed[end..].trim());
    maintainer.contains('<').then_some((maintainer, date))
}

/// RFC 2822, as people write it: the weekday may be wrong or missing, the month may be written out.
fn date_us(date: &str) -> Option<i64> {
    let date = date.split_once(',').map_or(date, |(_, rest)| rest);
    let [day, month, year, time, zone] = date.split_whitespace().take(5).collect::<Vec<_>>().try_into().ok()?;
    let month = month.get(..3)?;
    let parsed = DateTime::parse_from_rfc2822(&format!("{day} {month} {year} {time} {zone}")).ok()?;
    Some(parsed.timestamp_micros())
}

fn without_blank_ends<'a, 'b>(lines: &'b [&'a str]) -> &'b [&'a str] {
    let blank = |line: &&str| line.trim().is_empty();
    let start = lines.iter().position(|line| !blank(line)).unwrap_or(lines.len());
    let end = lines.iter().rposition(|line| !blank(line)).map_or(start, |last| last + 1);
    &lines[start..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASH: &str = "\
bash (5.2.15-2) unstable experimental; urgency=medium, binary-only=yes

  * Remove one more pdf file without source. Closes: #1024598.

    - Second line.

 -- Matthias Klose <doko@debian.org>  Mon, 02 Jan 2023 13:06:21 +0100
";

    fn odd(text: &str) -> Vec<(usize, Oddity)> {
        parse(text).odd
    }

    #[test]
    fn an_entry_is_taken_apart() {
        let parsed = parse(BASH);
        assert_eq!(parsed.odd, vec![]);
        let expected = Entry {
            package: "bash".into(),
            version: "5.2.15-2".into(),
            distributions: "unstable experimental".into(),
            urgency: Some("medium".into()),
            changed_at: Some(1_672_661_181_000_000),
            maintainer: "Matthias Klose <doko@debian.org>".into(),
            body: "  * Remove one more pdf file without source. Closes: #1024598.\n\n    - Second line.".into(),
        };
        assert_eq!(parsed.entries, vec![expected]);
    }

    #[test]
    fn a_remark_is_counted_and_the_entries_around_it_are_read() {
        let parsed = parse(&format!("{BASH}\n# Older entries have been removed from this changelog.\n{BASH}"));
        assert_eq!((parsed.entries.len(), parsed.odd), (2, vec![(9, Oddity::Remark)]));
    }

    #[test]
    fn text_in_an_older_format_is_counted_line_by_line() {
        let text = format!("{BASH}\nOld Changelog:\nbinutils (2.7-3):\n  * x\n");
        assert_eq!(odd(&text), (9..=11).map(|line| (line, Oddity::OutsideEntries)).collect::<Vec<_>>());
    }

    #[test]
    fn an_entry_without_trailer_is_reported_and_the_next_one_is_read() {
        let parsed = parse(&format!("a (1) unstable; urgency=low\n\n  * x\n\n{BASH}b (1) unstable; urgency=low\n"));
        assert_eq!(parsed.entries.len(), 1);
        assert_eq!(parsed.odd, vec![(1, Oddity::NoTrailer), (12, Oddity::NoTrailer)]);
    }

    #[test]
    fn trailers_that_name_nobody_or_stand_alone_are_reported() {
        assert_eq!(odd(" -- A <a@b>  Mon, 02 Jan 2023 13:06:21 +0100\n"), vec![(1, Oddity::LoneTrailer)]);
        assert_eq!(odd("a (1) unstable; urgency=low\n --\n"), vec![(2, Oddity::Nobody)]);
        assert_eq!(odd("a (1) unstable; urgency=low\n -- Somebody\n"), vec![(2, Oddity::Nobody)]);
    }

    #[test]
    fn dates_are_read_as_people_wrote_them() {
        let expected = Some(1_672_661_181_000_000);
        for date in
            ["Mon, 02 Jan 2023 13:06:21 +0100", "Sun,  2 January 2023 12:06:21 GMT", "2 Jan 2023 12:06:21 +0000 (UTC)"]
        {
            assert_eq!(date_us(date), expected, "{date}");
        }
        for date in ["", "Mon, 42 Jan 2023 13:06:21 +0100", "yesterday", "2 é 2023 12:06:21 GMT"] {
            assert_eq!(date_us(date), None, "{date}");
        }
        let undated = parse("a (1) unstable; urgency=low\n  * x\n -- A <a@b>\n");
        assert_eq!((undated.entries[0].changed_at, undated.odd), (None, vec![(3, Oddity::Date)]));
    }

    #[test]
    fn a_line_is_a_heading_only_in_full() {
        for line in [
            "binutils (2.7-3):",
            "gmp (1.3.2-1)",
            "  bash (5.2) unstable; urgency=low",
            "bash (5 2) unstable; urgency=low",
            "bash (5.2); urgency=low",
            "bash () unstable; urgency=low",
            "",
        ] {
            assert_eq!(heading(line), None, "{line}");
        }
        assert_eq!(heading("C++ (1:1~rc) a b;").unwrap().distributions, "a b");
        assert_eq!(heading("a (1) b; Urgency = HIGH (really)").unwrap().urgency, Some("HIGH (really)"));
    }
}
