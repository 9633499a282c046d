//! Which nodes jobs are kept away from: never so many that too few are left for one to start.

use super::parse::nodes_of_lists;

/// What became of the wish to keep jobs away from some nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Avoided {
    /// Nodes that jobs are kept away from now.
    pub news: Vec<String>,
    /// Nodes that they go on to use, since too few others would be left.
    pub spared: Vec<String>,
}

/// Keeps jobs away from bad nodes in their order, as far as they are kept away from no more than so many; those of the site and those
/// that are known to be bad already are among them.
pub fn avoid(bad: &[String], known: &[String], of_site: &[String], max_excluded: usize) -> Avoided {
    let mut avoided = Avoided::default();
    for node in bad.iter().filter(|node| !known.contains(node)) {
        let all = of_site.iter().chain(known).chain(&avoided.news).chain([node]);
        if nodes_of_lists(all.map(String::as_str)).len() <= max_excluded {
            avoided.news.push(node.clone());
        } else {
            avoided.spared.push(node.clone());
        }
    }
    avoided
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn enough_nodes_for_a_job_are_always_left() {
        // Bad, known, of the site, and the bound; then what is avoided and what is spared.
        let cases: [(&[&str], &[&str], &[&str], usize, &[&str], &[&str]); 7] = [
            (&["n3"], &[], &[], 1, &["n3"], &[]),
            // The job needs all nodes of its partition.
            (&["n3"], &[], &[], 0, &[], &["n3"]),
            (&["n3", "n4"], &[], &[], 1, &["n3"], &["n4"]),
            (&["n4"], &["n3"], &[], 1, &[], &["n4"]),
            (&["n4"], &["n3"], &["n[7-8]"], 4, &["n4"], &[]),
            (&["n4"], &["n3"], &["n[7-8]"], 3, &[], &["n4"]),
            // One that is avoided anyway takes no room.
            (&["n7", "n3"], &["n3"], &["n[7-8]"], 3, &["n7"], &[]),
        ];
        for (bad, known, of_site, max_excluded, news, spared) in cases {
            let found = avoid(&names(bad), &names(known), &names(of_site), max_excluded);
            assert_eq!(found, Avoided { news: names(news), spared: names(spared) }, "{bad:?} beside {known:?} and {of_site:?}");
        }
    }
}
