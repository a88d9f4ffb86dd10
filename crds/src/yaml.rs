//! A YAML document as a tree that remembers its lines.
//!
//! Owns: cutting a file into documents, so that a broken one does not hide the others, and the line of each field.
//! Does not own: what a field may hold ([`crate::schema`]).

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

/// One document of a file.
pub(crate) struct Document<'a> {
    /// Its text, without the line that separates it.
    pub text: &'a str,
    /// Number of lines of the file before `text`.
    pub lines_before: u32,
}

/// A value and the line on which it, or its key, stands; the first line of a file is 1.
#[derive(Debug)]
pub(crate) struct Node {
    pub line: u32,
    pub content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    Map(Vec<(String, Node)>),
    List(Vec<Node>),
    Scalar(Value),
}

/// Why a document is no YAML.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub line: u32,
    pub message: String,
}

/// Cuts at lines that begin with `---`: YAML knows no other meaning of such a line, inside of scalars neither.
pub(crate) fn documents(text: &str) -> Vec<Document<'_>> {
    let is_separator = |line: &str| {
        line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
    };
    let mut found = Vec::new();
    let (mut start, mut lines_before, mut at, mut line_number) = (0, 0, 0, 0);
    for line in text.split_inclusive('\n') {
        if is_separator(line.trim_end_matches(['\r', '\n'])) {
            found.push(Document { text: &text[start..at], lines_before });
            // What follows the dashes on their line belongs to the document.
            start = at + 3;
            lines_before = line_number;
        }
        at += line.len();
        line_number += 1;
    }
    found.push(Document { text: &text[start..], lines_before });
    found.retain(|document| !is_blank(document.text));
    found
}

fn is_blank(text: &str) -> bool {
    text.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#') || line == "...")
}

impl Document<'_> {
    /// The first line with content.
    pub fn first_line(&self) -> u32 {
        let is_content = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        self.lines_before + number(self.text.lines().position(is_content).unwrap_or(0)) + 1
    }

    /// Reads it.
    pub fn parse(&self) -> Result<Node, SyntaxError> {
        let options = serde_saphyr::options! { with_snippet: false };
        match serde_saphyr::from_str_with_options::<Spanned<Content>>(self.text, options) {
            Ok(root) => {
                let mut node = Node { line: line(&root), content: root.value };
                node.shift(self.lines_before);
                Ok(node)
            }
            Err(error) => {
                let within = error.location().map(|at| u32::try_from(at.line()).unwrap_or(u32::MAX)).filter(|l| *l > 0);
                let line = within.map_or(self.first_line(), |line| self.lines_before.saturating_add(line));
                Err(SyntaxError { line, message: plain_message(&error) })
            }
        }
    }
}

/// The message without its position, which [`SyntaxError::line`] has, counted from the start of the file.
fn plain_message(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    // The last is advice for programmers about the parser's options.
    let ends = [" at line ", " (line ", ", set "];
    let end = ends.iter().filter_map(|end| first.find(end)).min().unwrap_or(first.len());
    first[..end].trim_start_matches("error: ").trim_end_matches([':', ',', '.']).to_owned()
}

fn line<T>(spanned: &Spanned<T>) -> u32 {
    u32::try_from(spanned.referenced.line()).unwrap_or(u32::MAX).max(1)
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl Node {
    fn shift(&mut self, lines: u32) {
        self.line = self.line.saturating_add(lines);
        match &mut self.content {
            Content::Map(entries) => entries.iter_mut().for_each(|(_, node)| node.shift(lines)),
            Content::List(items) => items.iter_mut().for_each(|node| node.shift(lines)),
            Content::Scalar(_) => {}
        }
    }

    /// The same without lines.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Map(entries) => entries.iter().map(|(key, node)| (key.clone(), node.to_json())).collect(),
            Content::List(items) => items.iter().map(Self::to_json).collect(),
            Content::Scalar(value) => value.clone(),
        }
    }

    /// The member of that name, of a map.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// The text, of a string.
    pub fn as_str(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The line of `field`, as in `spec.columns[2].type`, or of the innermost part of it that is there.
    pub fn line_of(&self, field: &str) -> u32 {
        let mut node = self;
        for step in field.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match (&node.content, step.strip_suffix(']')) {
                (Content::List(items), Some(index)) => index.parse().ok().and_then(|index: usize| items.get(index)),
                _ => node.get(step),
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node.line
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Content>>()? {
            list.push(Node { line: line(&item), content: item.value });
        }
        Ok(Content::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Content, A::Error> {
        let mut map = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let value = entries.next_value::<Content>()?;
            map.push((key.value.clone(), Node { line: line(&key), content: value }));
        }
        Ok(Content::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_knows_its_line_in_the_file() {
        let text = "# head\n---\na: 1\nb:\n  - {c: x}\n  - c: z\n    d: [1, 2]\n--- # next\ne: true\n";
        let documents = documents(text);
        assert_eq!(documents.len(), 2);
        let first = documents[0].parse().unwrap();
        assert_eq!(first.line_of("a"), 3);
        assert_eq!(first.line_of("b"), 4);
        assert_eq!(first.line_of("b[0].c"), 5);
        assert_eq!(first.line_of("b[1].c"), 6);
        assert_eq!(first.line_of("b[1].d[1]"), 7);
        assert_eq!(first.line_of("b[1].missing.more"), 6);
        assert_eq!(first.to_json(), serde_json::json!({"a": 1, "b": [{"c": "x"}, {"c": "z", "d": [1, 2]}]}));
        assert_eq!(documents[1].parse().unwrap().line_of("e"), 9);
        assert_eq!((documents[0].first_line(), documents[1].first_line()), (3, 9));
    }

    #[test]
    fn a_syntax_error_names_the_line_of_the_file() {
        for (text, line) in [
            ("a: 1\n---\nb: [1,\nc: 2\n", 3..=5),
            ("a: 1\nb: \"x\n", 2..=3),
            ("---\na: 1\na: 2\n", 3..=3),
            ("a: 1\n  b: 2\n", 2..=2),
        ] {
            let errors: Vec<SyntaxError> =
                documents(text).iter().filter_map(|document| document.parse().err()).collect();
            assert_eq!(errors.len(), 1, "{text}");
            assert!(line.contains(&errors[0].line), "{text}: {}", errors[0].line);
            assert!(!errors[0].message.is_empty() && !errors[0].message.contains(" line "), "{}", errors[0].message);
        }
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let item = format!("*a{}", level - 1);
            text.push_str(&format!("a{level}: &a{level} [{}]\n", vec![item; 10].join(", ")));
        }
        assert!(documents(&text)[0].parse().is_err());
    }
}
