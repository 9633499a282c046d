//! The data: sources, filters and the text of a sample.

use super::{Context, template};
use crate::raw::{DataRaw, SourceRaw};
use crate::recipe::{DataRecipe, DataSource};

pub(super) fn check(context: &mut Context<'_>, raw: DataRaw) -> DataRecipe {
    if raw.cap_per_task.is_some() && raw.wanted_total.is_some() {
        let message = "found both `cap_per_task` and `wanted_total`, expected at most one of them; unset the other with `null`";
        context.problem("data.wanted_total", message);
    }
    context.regexes("data.only", &raw.only);
    context.regexes("data.hold_out", &raw.hold_out);
    context.regexes("data.hold_out_templates", &raw.hold_out_templates);
    template::check_training(context, "data.template", &raw.template);
    let current_folder = context.current_folder;
    DataRecipe {
        output: context.path_in("data.output", &raw.output, current_folder),
        sources: raw.sources.into_iter().enumerate().map(|(index, source)| checked_source(context, index, source)).collect(),
        only: raw.only,
        hold_out: raw.hold_out,
        max_tasks: raw.max_tasks,
        cap_per_task: raw.cap_per_task,
        wanted_total: raw.wanted_total,
        fraction: raw.fraction,
        mixing_cap: raw.mixing_cap,
        max_length: raw.max_length,
        truncate: raw.truncate,
        template: raw.template,
        hold_out_templates: raw.hold_out_templates,
    }
}

fn checked_source(context: &mut Context<'_>, index: usize, raw: SourceRaw) -> DataSource {
    let SourceRaw { url, task, options } = raw;
    let path = format!("data.sources.{index}.url");
    let folder = context.root.place_of(&path).folder();
    let url = context.url(&path, &url, folder);
    context.no_secrets(&format!("data.sources.{index}.options"), &options);
    DataSource { url, task, options }
}
