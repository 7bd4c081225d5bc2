//! The namespaces that a command runs in.

use super::process::ProcessId;

#[derive(Clone, Debug)]
pub enum Place {
    /// This process's own.
    Here,
    /// A named network namespace.
    Network(String),
    /// All namespaces of a host, by its first process.
    Host(ProcessId),
}

impl Place {
    /// The command line that runs `command` there.
    pub fn command_line(&self, command: &[&str]) -> Vec<String> {
        let way = match self {
            Self::Here => vec![],
            Self::Network(name) => vec!["nsenter".into(), format!("--net=/run/netns/{name}"), "--".into()],
            Self::Host(init) => {
                let mut way = vec!["nsenter".into(), format!("--target={}", init.pid)];
                way.extend(["--mount", "--net", "--uts", "--ipc", "--pid", "--"].map(String::from));
                way
            }
        };
        way.into_iter().chain(command.iter().map(|word| (*word).to_owned())).collect()
    }

    /// Whether the program runs as a child of what brought it there: to enter a process namespace takes a fork.
    pub fn forks(&self) -> bool {
        matches!(self, Self::Host(_))
    }
}
