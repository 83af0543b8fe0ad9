//! Results for people and for programs.

pub(crate) mod html;
pub(crate) mod json;
pub(crate) mod plot;
pub(crate) mod table;
pub(crate) mod warnings;

use std::path::Path;

use crate::result::Outcome;

/// Writes the files that were asked for.
pub(crate) fn write_files(
    outcomes: &[Outcome],
    json: Option<&Path>,
    plot: Option<&Path>,
    html: Option<&Path>,
) -> Result<(), String> {
    let write = |file: Option<&Path>, text: &dyn Fn() -> String| match file {
        Some(file) => std::fs::write(file, text()).map_err(|error| format!("{}: {error}", file.display())),
        None => Ok(()),
    };
    write(json, &|| format!("{:#}\n", json::document(outcomes)))?;
    write(plot, &|| plot::svg(outcomes))?;
    write(html, &|| html::page(outcomes))
}
