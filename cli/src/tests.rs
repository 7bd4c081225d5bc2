//! The command line as a whole: every command parses, explains itself, and ends with the status of its error.

use std::collections::BTreeSet;

use clap::Command as Clap;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    let found = Cli::command().try_get_matches_from(line.split_whitespace())?;
    Cli::from_arg_matches(&found)
}

/// Every command that can be run, by its full name.
fn leaves(command: &Clap, path: &str, found: &mut Vec<(String, Clap)>) {
    let shown: Vec<&Clap> = command.get_subcommands().filter(|c| !c.is_hide_set()).collect();
    if shown.is_empty() {
        found.push((path.to_owned(), command.clone()));
    }
    for sub in shown {
        leaves(sub, &format!("{path} {}", sub.get_name()), found);
    }
}

#[test]
fn the_arguments_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_says_what_it_does_and_shows_an_example_that_parses() {
    let mut found = Vec::new();
    leaves(&Cli::command(), "trefoil", &mut found);
    let names: BTreeSet<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    for expected in ["trefoil vm create", "trefoil image import", "trefoil quorum status", "trefoil completion"] {
        assert!(names.contains(expected), "{expected} is missing");
    }
    for (name, command) in &found {
        assert!(command.get_about().is_some(), "{name} has no description");
        for argument in command.get_arguments().filter(|a| !a.is_hide_set() && !a.is_global_set()) {
            assert!(argument.get_help().is_some(), "{name}: {} has no description", argument.get_id());
        }
        let Some(help) = command.get_after_help() else {
            // The lab's own commands are shown together, under `trefoil lab`.
            assert!(name.starts_with("trefoil lab "), "{name} has no example");
            continue;
        };
        let help = help.to_string().replace("\\\n", " ");
        let example = help.lines().map(str::trim).find(|line| line.starts_with("trefoil ")).unwrap_or_default();
        assert!(example.starts_with(name.as_str()), "{name} has an example of another command: {example}");
        let typed = example.split(" > ").next().unwrap_or_default();
        parse(typed).unwrap_or_else(|e| panic!("{name}: its example does not parse: {e}"));
    }
}

#[test]
fn options_of_every_command_may_stand_anywhere() {
    for line in ["trefoil --tenant a -o json vm show web", "trefoil vm show web --tenant a --output json"] {
        let cli = parse(line).unwrap();
        assert_eq!((cli.global.tenant.as_deref(), cli.global.output), (Some("a"), Some(Format::Json)), "{line}");
    }
    let cli = parse(
        "trefoil vm list --request-id 0190b2c8-0000-7000-8000-000000000001 --timeout 2m --endpoint a:1 --endpoint b:1",
    );
    let global = cli.unwrap().global;
    assert_eq!(global.timeout.as_secs(), 120);
    assert_eq!((global.endpoints.len(), global.request_id.is_some()), (2, true));
}

#[test]
fn what_cannot_be_meant_is_refused() {
    for line in [
        "trefoil",
        "trefoil vm",
        "trefoil vm create web",
        "trefoil vm delete web --wait --no-wait",
        "trefoil vm show",
        "trefoil vm show web --unknown",
        "trefoil vm list --request-id 17",
        "trefoil vm list --timeout soon",
        "trefoil template create a --vcpus one --memory 1G --disk 1G",
        "trefoil template create a --vcpus 1 --memory much --disk 1G",
        "trefoil price set -1",
        "trefoil price set 0.0000000001",
        "trefoil bill show --from yesterday",
        "trefoil quorum add node-1",
        "trefoil user create ann --role king",
        "trefoil tag set k v --expected-version x",
        "trefoil vm list --output xml",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

/// It stays what it was: 0 would take a machine's place in the queue away from it.
#[test]
fn a_priority_that_is_left_out_is_not_set_to_the_lowest() {
    let priority = |line: &str| match parse(line).unwrap().command {
        arguments::Command::Vm(commands::vm::VmCommand::Recovery { priority, .. }) => priority,
        other => panic!("{other:?} is no recovery"),
    };
    assert_eq!(priority("trefoil vm recovery web none"), None);
    assert_eq!(priority("trefoil vm recovery web none --priority 0"), Some(0));
}

#[cfg(feature = "controller")]
#[test]
fn a_join_token_is_not_a_users_token() {
    let cli = parse("trefoil controller join --data d --advertise h:1 --token trefoil-join-x").unwrap();
    let arguments::Command::Controller(command) = cli.command else { panic!("it is a controller command") };
    assert!(format!("{command:?}").contains("trefoil-join-x"));
    assert!(!command.is_server() && parse("trefoil controller run --data d").unwrap().command.is_server());
}

#[test]
fn the_exit_status_tells_the_kind_of_trouble() {
    let status = |line: &str| format!("{:?}", main(line.split_whitespace().map(OsString::from)));
    let of = |status: u8| format!("{:?}", ExitCode::from(status));
    assert_eq!(status("trefoil --version"), of(0));
    assert_eq!(status("trefoil vm frobnicate"), of(2));
    assert_eq!(status("trefoil vm list --config /missing/client.toml --output json"), of(2));
    let dir = tempfile::tempdir().unwrap();
    let nobody = format!(
        "trefoil vm list --token t --ca {} --timeout 50ms --endpoint unix:{}/x.sock -o json",
        ca(&dir),
        dir.path().display()
    );
    assert_eq!(status(&nobody), of(5));
}

fn ca(dir: &tempfile::TempDir) -> String {
    let authority = api::tls::CertificateAuthority::create("test").unwrap();
    let path = dir.path().join("ca.pem");
    std::fs::write(&path, authority.ca_pem).unwrap();
    path.display().to_string()
}

#[test]
fn json_is_recognised_in_arguments_that_do_not_parse() {
    let asks = |line: &str| asks_for_json(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>());
    assert!(asks("trefoil --output json") && asks("trefoil x -o json y") && asks("trefoil --output=json"));
    assert!(!asks("trefoil --output table json"));
}
