//! Our figures beside those of others, from one run on one machine.

/// Lines of the comparison, in the order in which they were measured.
#[derive(Default)]
pub struct Sides(Vec<Side>);

struct Side {
    what: String,
    ours: f64,
    other: Option<(&'static str, f64)>,
    target: &'static str,
}

impl Sides {
    /// Adds a line. `what` ends in the unit; `other` is who else did the same; `target` is what is promised of the ratio, or
    /// of our figure, empty where nothing is.
    pub fn add(
        &mut self,
        what: impl Into<String>,
        ours: f64,
        other: Option<(&'static str, f64)>,
        target: &'static str,
    ) {
        self.0.push(Side { what: what.into(), ours, other, target });
    }

    /// Prints all lines.
    pub fn print(&self) {
        println!("\n{:<68} {:>9} {:>9} {:>7}  {:<22}  target", "side by side", "KalamDB", "other", "ratio", "other");
        for Side { what, ours, other, target } in &self.0 {
            let (name, figure, ratio) = match other {
                Some((name, other)) => (*name, shown(*other), format!("{:.2}x", ours / other)),
                None => ("", "-".to_owned(), "-".to_owned()),
            };
            let line = format!("{what:<68} {:>9} {figure:>9} {ratio:>7}  {name:<22}  {target}", shown(*ours));
            println!("{}", line.trim_end());
        }
    }
}

/// With about three digits.
fn shown(figure: f64) -> String {
    if figure < 10.0 { format!("{figure:.3}") } else { format!("{figure:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_show_three_digits_or_all_before_the_point() {
        assert_eq!([shown(0.0213), shown(9.5), shown(45_012.4)], ["0.021", "9.500", "45012"]);
    }
}
