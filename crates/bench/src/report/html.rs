//! One page with the tables and plots, that needs no other file.

use super::plot::{escape, svg};
use super::table::table;
use crate::result::Outcome;

/// The page.
pub(crate) fn page(outcomes: &[Outcome]) -> String {
    let sections: String = outcomes
        .iter()
        .map(|outcome| {
            format!(
                "<section>\n{}<pre>{}</pre>\n</section>\n",
                svg(std::slice::from_ref(outcome)),
                escape(table(outcome).trim())
            )
        })
        .collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>metastore bench</title>\n<style>\n\
         body {{ font-family: sans-serif; margin: 1.5em; color: #222; background: white; }}\n\
         svg {{ max-width: 100%; height: auto; }}\n\
         pre {{ overflow-x: auto; font-size: 13px; }}\n\
         </style>\n</head>\n<body>\n<h1>metastore bench</h1>\n{sections}</body>\n</html>\n"
    )
}
